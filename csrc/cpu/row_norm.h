// SPDX-License-Identifier: Apache-2.0
// What a transformer does to a token between two linear layers, straight to int8; over raw pointers, no torch here.
#pragma once

#include <cstdint>

#include "cpu/update.h"

namespace zo::cpu {

struct Rows {
  const void* x;  // [rows][stride] of dtype
  Dtype dtype;
  int64_t channels, stride;  // of the result; of a row of x
  const float *weight, *bias;  // [channels] or null: of LayerNorm
  float eps;
  int8_t* codes;  // [rows][channels]
  float* scale;   // [rows]
};

}  // namespace zo::cpu
