// SPDX-License-Identifier: Apache-2.0
// What a launch of the update ops is given. The table and its numbers are those of the Triton kernels:
// zo_kernels/kernels/_table.py and _updates.py.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "cuda/dtype.h"

namespace zo::cuda {

// A tensor; what it lacks is 0.
struct Row {
  uint64_t p, state[2];  // addresses
  int64_t n;
  int64_t stream;
  int32_t middle;  // bits of 1.5 2^23 quantum
  int32_t unused;
};
static_assert(sizeof(Row) == 48);

struct Launch {
  const Row* rows;
  const int64_t* chunks;  // [count]: row << 32 | first tile
  int64_t count;
  int64_t tile, tiles;    // elements of a tile, a multiple of 128; tiles of a chunk
  const int64_t* base;    // [1]
  const int64_t* draws;   // [terms + 1], counted from base; the last is that of the rounding
  const float* factors;   // [terms]
  const float* hyper;     // the numbers of the op
  int64_t terms;
  uint64_t seed;
  Kind kind;
  Dtype dtype;
  bool grid;     // fp32: results lie on the grids of the rows
  bool rounds;   // 16-bit results at random
  bool aligned;  // every address is a multiple of 16
  bool sign;     // zo_sgd: step by the sign
  bool buffer;   // zo_sgd: there is one
};

#if defined(__CUDACC__) || defined(ZO_LAUNCHERS)
// On the current device; an error of the launch.
cudaError_t add_noise(const Launch& launch, cudaStream_t stream);
cudaError_t zo_sgd(const Launch& launch, cudaStream_t stream);
cudaError_t zo_adam(const Launch& launch, cudaStream_t stream);
#endif

}  // namespace zo::cuda
