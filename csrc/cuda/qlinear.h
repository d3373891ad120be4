// SPDX-License-Identifier: Apache-2.0
// What a launch of `qlinear` with few rows is given, and how it is cut.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "cuda/dtype.h"

namespace zo::cuda {

constexpr int kMostRows = 16;  // of x
constexpr int kChunk = 64;     // channels that a warp takes at a time: K and a group are multiples
constexpr int kWarpRows = 32;  // of the weight: two panels
constexpr int kWarps = 8;      // of a block
constexpr int kMostRanks = 8;  // blocks of a cluster that every Hopper GPU can place

// `row_warps` of a block's warps lie along N, the others and the `ranks` blocks of a cluster along K.
struct Cut {
  int row_warps, ranks;

  ZO_HOST_DEVICE int ways() const { return kWarps / row_warps; }
  ZO_HOST_DEVICE int rows() const { return kWarpRows * row_warps; }
  ZO_HOST_DEVICE int64_t blocks(int64_t n) const { return (n + rows() - 1) / rows(); }
};

// x comes through L2 once for each block along N, so a block is as high as leaves every multiprocessor one, and two
// where a cluster can share K. Not yet confirmed on a GPU: chosen by counting bytes.
inline Cut cut_of(int64_t n, int64_t k, int processors, bool clusters) {
  Cut cut{4, 1};
  const auto parts = [&] { return int64_t{cut.ranks} * cut.ways(); };
  while (clusters && cut.ranks < kMostRanks && cut.blocks(n) * cut.ranks <= processors && 2 * parts() <= k / kChunk) {
    cut.ranks *= 2;
  }
  while (cut.row_warps > 1 && cut.blocks(n) * cut.ranks < processors) cut.row_warps /= 2;
  return cut;
}

struct Product {
  const void* x;          // fp16 or bf16 [M, K], at a multiple of 16
  const void* weight;     // packed, at a multiple of 16
  const float* scale;     // [N, groups]
  const int8_t* zero;     // [N, groups], or null
  const void* bias;       // [N], or null
  void* y;                // [M, N]
  int64_t n;
  int m, k, groups, bits;
  Dtype x_dtype, bias_dtype, y_dtype;
  Cut cut;
};

#if defined(__CUDACC__) || defined(ZO_LAUNCHERS)
// On the current device, which chooses the cut; an error of the launch.
cudaError_t qlinear(Product product, cudaStream_t stream);
#endif

}  // namespace zo::cuda
