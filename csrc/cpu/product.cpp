// SPDX-License-Identifier: Apache-2.0
// Which instruction set a product runs on.
#include "cpu/product.h"

#include <limits>

#include "cpu/half.h"
#include "cpu/isa.h"

namespace zo::cpu {
namespace {

// AVX-512 of the first generation has no dot product of bytes.
Isa product_isa() {
#if defined(ZO_X86)
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  const Isa chosen = isa();
  return chosen == Isa::avx512 && !has_vnni ? Isa::avx2 : chosen;
#else
  return isa();
#endif
}

}  // namespace

void multiply(const Product& p, int64_t panel, int64_t panel_end, int64_t tile, int64_t tile_end) {
  switch (product_isa()) {
#if defined(ZO_X86)
    case Isa::avx512: return multiply_avx512(p, panel, panel_end, tile, tile_end);
    case Isa::avx2:
      // Its dot product negates activations.
      if (!p.has_minus_128) return multiply_avx2(p, panel, panel_end, tile, tile_end);
      [[fallthrough]];
#endif
    default: return multiply_scalar(p, panel, panel_end, tile, tile_end);
  }
}

uint32_t largest(const Quantize& q, int64_t begin, int64_t end) {
  switch (product_isa()) {
#if defined(ZO_X86)
    case Isa::avx512: return largest_avx512(q, begin, end);
    case Isa::avx2: return largest_avx2(q, begin, end);
#endif
    default: return largest_scalar(q, begin, end);
  }
}

void quantize(const Quantize& q, int64_t begin, int64_t end, uint32_t largest) {
  switch (product_isa()) {
#if defined(ZO_X86)
    case Isa::avx512: return quantize_avx512(q, begin, end, largest);
    case Isa::avx2: return quantize_avx2(q, begin, end, largest);
#endif
    default: return quantize_scalar(q, begin, end, largest);
  }
}

void widen(const Quantize& q, int64_t begin, int64_t end, float* out) {
  switch (product_isa()) {
#if defined(ZO_X86)
    case Isa::avx512: return widen_avx512(q, begin, end, out);
    case Isa::avx2: return widen_avx2(q, begin, end, out);
#endif
    default: return widen_scalar(q, begin, end, out);
  }
}

float scale_of(uint32_t largest) {
  if (largest < kTiny) return 0.0f;
  if (largest >= kInfinity) return std::numeric_limits<float>::quiet_NaN();
  return float_of(largest) / 127.0f;
}

}  // namespace zo::cpu
