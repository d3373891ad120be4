// SPDX-License-Identifier: Apache-2.0
// GroupNorm of pixels-last activations, with what comes before it (a shift) and after it (an activation,
// quantization) in the same passes; over raw pointers, no torch here.
#pragma once

#include <cstdint>

#include "cpu/product.h"

namespace zo::cpu {

// One sample.
struct Norm {
  const void* x;  // [pixels][channels] of dtype
  Dtype dtype;
  int64_t channels;
  // y = activation((x + before) * by + after), [channels] padded to kPanel; from the moments.
  const float *before, *by, *after;
  Activation activation;
};

}  // namespace zo::cpu
