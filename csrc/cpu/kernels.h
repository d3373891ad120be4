// SPDX-License-Identifier: Apache-2.0
// The kernels of the quantized ops for one instruction set, and the choice of the set.
#pragma once

#include "cpu/attention.h"
#include "cpu/group_norm.h"
#include "cpu/product.h"
#include "cpu/quantize.h"
#include "cpu/row_norm.h"

namespace zo::cpu {

struct Kernels {
  // Columns of panels [panel, panel_end), all rows of tiles [tile, tile_end), tiles counted over all sets.
  void (*multiply)(const Product& p, int64_t panel, int64_t panel_end, int64_t tile, int64_t tile_end);

  // Bits of the largest |x in_scale| of rows [begin, end): as integers, so that Inf and NaN win.
  uint32_t (*largest)(const Quantize& q, int64_t begin, int64_t end);
  // Codes and sums of rows [begin, end) whose largest magnitude has these bits.
  void (*quantize)(const Quantize& q, int64_t begin, int64_t end, uint32_t largest);
  // Sums of codes [rows][groups][channels / groups]; whether -128 is among them.
  bool (*add_up)(const int8_t* codes, int64_t rows, int64_t channels, int64_t groups, int32_t* sums);
  // Rows [begin, end) as fp32 [rows][channels], times in_scale.
  void (*widen)(const Quantize& q, int64_t begin, int64_t end, float* out);

  // Sums of x - x0 and of its square over pixels [begin, end), x0 being the first pixel: [2][channels].
  void (*moments)(const Norm& n, int64_t begin, int64_t end, float* sums);
  // y of pixels [begin, end), `out` being that of pixel 0.
  void (*normalize)(const Norm& n, int64_t begin, int64_t end, void* out, Dtype out_dtype);
  // `largest` and `quantize` of y.
  uint32_t (*largest_normalized)(const Norm& n, int64_t begin, int64_t end);
  void (*quantize_normalized)(const Norm& n, int64_t begin, int64_t end, uint32_t largest, int8_t* codes);

  // Codes and scales of rows [begin, end): of layer_norm(x), and of x gelu(gate) where a row of x is both, in turn.
  void (*quantize_layer_norm)(const Rows& r, int64_t begin, int64_t end);
  void (*quantize_geglu)(const Rows& r, int64_t begin, int64_t end);

  // Queries [begin, end) of a head.
  void (*attend)(const Attention& a, int64_t begin, int64_t end);
};

extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512;

// Those of the instruction set in use.
const Kernels& kernels();
// Those that can multiply `p`.
const Kernels& kernels_for(const Product& p);

}  // namespace zo::cpu
