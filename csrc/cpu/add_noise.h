// SPDX-License-Identifier: Apache-2.0
// Micro-kernels of add_noise_ over raw pointers; no torch here.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace zo::cpu {

enum class Dtype { f32, bf16, f16 };

// p <- decay * p + sum_j scales[j] * z(seed, draws[j], stream, .)
struct NoiseTerms {
  uint64_t seed;
  uint32_t stream;
  Kind kind;
  float decay;
  int64_t count;          // number of terms
  const int64_t* draws;   // [count]
  const float* scales;    // [count]
};

// Chunks start at a multiple of this many elements, so that no block of either kind straddles two.
constexpr int64_t kChunkAlignment = 128;

// Elements [first, first + n) of a parameter whose element `first` lies at `p`;
// first must be a multiple of kChunkAlignment.
void add_noise(void* p, Dtype dtype, int64_t first, int64_t n, const NoiseTerms& terms);

using AddNoise = void (*)(void* p, Dtype dtype, int64_t first, int64_t n, const NoiseTerms& terms);
void add_noise_scalar(void* p, Dtype dtype, int64_t first, int64_t n, const NoiseTerms& terms);
void add_noise_avx2(void* p, Dtype dtype, int64_t first, int64_t n, const NoiseTerms& terms);
void add_noise_avx512(void* p, Dtype dtype, int64_t first, int64_t n, const NoiseTerms& terms);

}  // namespace zo::cpu
