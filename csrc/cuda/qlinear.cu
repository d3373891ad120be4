// SPDX-License-Identifier: Apache-2.0
// The kernels of `qlinear` with few rows: codes of 4 or 8 bits, fp16 or bf16, up to 8 rows or up to 16.
#include "cuda/qlinear.cuh"

#include <cooperative_groups.h>

namespace zo::cuda {
namespace {

constexpr int kBlocks = 2;  // of a multiprocessor: leaves 128 registers a thread, so that none spills

template <int kBits, class D, int kTiles>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) qlinear_kernel(const Product p) {
  __shared__ float shared[kWarpRows * kWarps * 8 * kTiles];
  const Place at(p, blockIdx.x, static_cast<int>(threadIdx.x / 32));
  Totals<kTiles> totals[kLanes] = {};
  multiply<kBits, D>(totals, p, at);
  share(shared, totals, p, at);
  const int thread = static_cast<int>(threadIdx.x);
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  finish<kTiles>(p, at, thread, [&](int rank) { return cluster.map_shared_rank(shared, rank); });
  cluster.sync();  // none leaves while another reads its shared memory
#else
  __syncthreads();
  finish<kTiles>(p, at, thread, [&](int) { return shared; });
#endif
}

template <int kBits, class D, int kTiles>
cudaError_t launch(const Product& p, cudaStream_t stream) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(p.cut.ranks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.cut.blocks(p.n) * p.cut.ranks));
  config.blockDim = dim3(32 * kWarps);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = p.cut.ranks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, qlinear_kernel<kBits, D, kTiles>, p);
}

template <int kBits, class D>
cudaError_t dispatch_rows(const Product& p, cudaStream_t stream) {
  return p.m > 8 ? launch<kBits, D, 2>(p, stream) : launch<kBits, D, 1>(p, stream);
}

template <int kBits>
cudaError_t dispatch_dtype(const Product& p, cudaStream_t stream) {
  return p.x_dtype == Dtype::f16 ? dispatch_rows<kBits, F16>(p, stream) : dispatch_rows<kBits, Bf16>(p, stream);
}

}  // namespace

cudaError_t qlinear(Product p, cudaStream_t stream) {
  int device = 0, processors = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  p.cut = cut_of(p.n, p.k, processors, major >= 9);
  return p.bits == 4 ? dispatch_dtype<4>(p, stream) : dispatch_dtype<8>(p, stream);
}

}  // namespace zo::cuda
