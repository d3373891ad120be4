// SPDX-License-Identifier: Apache-2.0
// Micro-kernels of the ops that add regenerated noise to parameters, over raw pointers; no torch here. What
// they compute is the text of zo_kernels/_arithmetic.py.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace zo::cpu {

enum class Dtype { f32, bf16, f16 };
enum class Op { add_noise, zo_sgd, zo_adam };

// What all parameters of a call share.
struct Call {
  Op op;
  uint64_t seed;
  Kind kind;
  int64_t count;         // number of terms
  const int64_t* draws;  // [count]
  const float* factors;  // [count]
  const float* hyper;    // the numbers of the op
  bool sign;             // zo_sgd: step by the sign
  bool rounds;           // 16-bit results at random, by the bits of round_draw
  int64_t round_draw;
};

// Elements [first, first + n) of a parameter, and of what the op keeps for it.
struct Piece {
  void* p;
  Dtype dtype;
  uint32_t stream;
  float quantum;  // of fp32, 0: off
  int64_t first;  // a multiple of kChunkAlignment
  int64_t n;
  float* state[2];  // null where the op has none
};

// No block of any kind straddles a multiple of this many elements.
constexpr int64_t kChunkAlignment = 128;

void update(const Piece& piece, const Call& call);

void update_scalar(const Piece& piece, const Call& call);
void update_avx2(const Piece& piece, const Call& call);
void update_avx512(const Piece& piece, const Call& call);

}  // namespace zo::cpu
