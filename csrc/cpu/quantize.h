// SPDX-License-Identifier: Apache-2.0
// Dynamic quantization of activations: int8, by the largest magnitude of a row or a sample.
#pragma once

#include <cstdint>
#include <limits>

#include "cpu/half.h"
#include "cpu/update.h"

namespace zo::cpu {

struct Quantize {
  const void* x;
  Dtype dtype;
  int64_t channels, stride;  // of a row, elements
  const float* in_scale;     // [channels] or null
  int8_t* codes;             // [rows][padded], zeros behind `channels`
  int64_t padded;
  int32_t* sums;  // [rows][groups], or null
  int64_t groups;
};

namespace {

constexpr uint32_t kInfinity = 0x7F800000, kTiny = 0x0D800000;  // bits of Inf and of 2^-100

// Otherwise all codes are 0: of zeros, or of what makes the scale NaN.
inline bool has_scale(uint32_t largest) { return largest >= kTiny && largest < kInfinity; }

// The scale of values of which the largest magnitude has these bits.
inline float scale_of(uint32_t largest) {
  if (largest >= kInfinity) return std::numeric_limits<float>::quiet_NaN();
  return has_scale(largest) ? float_of(largest) / 127.0f : 0.0f;
}

}  // namespace
}  // namespace zo::cpu
