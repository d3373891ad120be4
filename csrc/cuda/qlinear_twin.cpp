// SPDX-License-Identifier: Apache-2.0
// The code of the CUDA kernels of `qlinear`, compiled for the host: see host_twin.cpp. Warps run one after another,
// lane by lane, and an mma is computed from the fragments that PTX documents.
#include "cuda/qlinear.cuh"

#include <vector>

namespace zo::cuda {
namespace {

template <int kBits, class D, int kTiles>
void run(const Product& p) {
  const int64_t blocks = p.cut.blocks(p.n) * p.cut.ranks;
  for (int64_t cluster = 0; cluster < blocks; cluster += p.cut.ranks) {
    std::vector<std::vector<float>> shared(p.cut.ranks, std::vector<float>(kWarpRows * kWarps * 8 * kTiles));
    for (int i = 0; i < p.cut.ranks * kWarps; ++i) {
      const Place at(p, cluster + i / kWarps, i % kWarps);
      Totals<kTiles> totals[kLanes] = {};
      multiply<kBits, D>(totals, p, at);
      share(shared[at.rank].data(), totals, p, at);
    }
    for (int i = 0; i < p.cut.ranks * 32 * kWarps; ++i) {
      const Place at(p, cluster + i / (32 * kWarps), i % (32 * kWarps) / 32);
      finish<kTiles>(p, at, i % (32 * kWarps), [&](int rank) { return shared[rank].data(); });
    }
  }
}

template <int kBits, class D>
void dispatch_rows(const Product& p) {
  p.m > 8 ? run<kBits, D, 2>(p) : run<kBits, D, 1>(p);
}

template <int kBits>
void dispatch_dtype(const Product& p) {
  p.x_dtype == Dtype::f16 ? dispatch_rows<kBits, F16>(p) : dispatch_rows<kBits, Bf16>(p);
}

}  // namespace
}  // namespace zo::cuda

// numbers: M, N, K, groups, bits, dtypes of x, bias and y, multiprocessors, whether blocks come in clusters.
extern "C" void zo_qlinear(const void* x, const void* weight, const float* scale, const int8_t* zero, const void* bias,
                           void* y, const int64_t* numbers) {
  using namespace zo::cuda;
  Product p{};
  p.x = x, p.weight = weight, p.scale = scale, p.zero = zero, p.bias = bias, p.y = y;
  p.m = static_cast<int>(numbers[0]), p.n = numbers[1], p.k = static_cast<int>(numbers[2]);
  p.groups = static_cast<int>(numbers[3]), p.bits = static_cast<int>(numbers[4]);
  p.x_dtype = static_cast<Dtype>(numbers[5]);
  p.bias_dtype = static_cast<Dtype>(numbers[6]), p.y_dtype = static_cast<Dtype>(numbers[7]);
  p.cut = cut_of(p.n, p.k, static_cast<int>(numbers[8]), numbers[9] != 0);
  p.bits == 4 ? dispatch_dtype<4>(p) : dispatch_dtype<8>(p);
}

// What `cut_of` says: warps of a block along N, and blocks of a cluster.
extern "C" void zo_qlinear_cut(int64_t n, int64_t k, int64_t processors, int64_t clusters, int64_t* to) {
  const auto cut = zo::cuda::cut_of(n, k, static_cast<int>(processors), clusters != 0);
  to[0] = cut.row_warps, to[1] = cut.ranks;
}
