// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the noise contract for one element, on a GPU and, for tests, on the host: every float
// operation is correctly rounded, and none is contracted to fma. On the host that takes -ffp-contract=off.
#pragma once

#include "common/philox.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#include "cpu/half.h"

namespace zo::cuda {

#ifdef __CUDA_ARCH__
#define ZO_EITHER(device, host) device
#else
#define ZO_EITHER(device, host) host
#endif

ZO_HOST_DEVICE inline float mul(float a, float b) { return ZO_EITHER(__fmul_rn(a, b), a * b); }
ZO_HOST_DEVICE inline float add(float a, float b) { return ZO_EITHER(__fadd_rn(a, b), a + b); }
ZO_HOST_DEVICE inline float sub(float a, float b) { return ZO_EITHER(__fsub_rn(a, b), a - b); }
ZO_HOST_DEVICE inline float div(float a, float b) { return ZO_EITHER(__fdiv_rn(a, b), a / b); }
ZO_HOST_DEVICE inline float fma(float a, float b, float c) {
  return ZO_EITHER(__fmaf_rn(a, b, c), __builtin_fmaf(a, b, c));
}
ZO_HOST_DEVICE inline float sqrt(float a) { return ZO_EITHER(__fsqrt_rn(a), __builtin_sqrtf(a)); }
ZO_HOST_DEVICE inline float from_u32(uint32_t a) { return ZO_EITHER(__uint2float_rn(a), static_cast<float>(a)); }
ZO_HOST_DEVICE inline float from_i32(int32_t a) { return ZO_EITHER(__int2float_rn(a), static_cast<float>(a)); }
ZO_HOST_DEVICE inline uint32_t bits(float a) { return ZO_EITHER(__float_as_uint(a), cpu::bits_of(a)); }
ZO_HOST_DEVICE inline float floats(uint32_t a) { return ZO_EITHER(__uint_as_float(a), cpu::float_of(a)); }

// Memory of one dtype: a 16-bit number is its bits. kLargest: bits of its largest finite number, as fp32.
struct F32 {
  using T = float;
  static constexpr bool kHalf = false;
  ZO_HOST_DEVICE static float load(T x) { return x; }
  ZO_HOST_DEVICE static T nearest(float x) { return x; }
};
struct Bf16 {
  using T = uint16_t;
  static constexpr bool kHalf = true;
  static constexpr uint32_t kLargest = 0x7F7F0000;
  ZO_HOST_DEVICE static float load(T x) { return floats(uint32_t{x} << 16); }
  ZO_HOST_DEVICE static T nearest(float x) {
    return ZO_EITHER(__bfloat16_as_ushort(__float2bfloat16_rn(x)), cpu::float_to_bf16(x));
  }
  ZO_HOST_DEVICE static uint32_t random(uint32_t x, uint32_t, uint32_t r) { return (x + r) >> 16; }
};
struct F16 {
  using T = uint16_t;
  static constexpr bool kHalf = true;
  static constexpr uint32_t kLargest = 0x477FE000, kSmallestNormal = 0x38800000;
  ZO_HOST_DEVICE static float load(T x) { return ZO_EITHER(__half2float(__ushort_as_half(x)), cpu::f16_to_float(x)); }
  ZO_HOST_DEVICE static T nearest(float x) {
    return ZO_EITHER(__half_as_ushort(__float2half_rn(x)), cpu::float_to_f16(x));
  }
  ZO_HOST_DEVICE static uint32_t random(uint32_t x, uint32_t magnitude, uint32_t r) {
    uint32_t rounded = (magnitude + (r >> 3) - (112u << 23)) >> 13;
    if (magnitude < kSmallestNormal) {
      rounded = (static_cast<uint32_t>(mul(floats(magnitude), 0x1p40f)) + r) >> 16;  // units of 2^-24
    }
    return rounded | (x >> 16 & 0x8000);
  }
};

// Rounded by the 16-bit integer r; beyond the finite range to the nearest.
template <class D>
ZO_HOST_DEVICE inline uint16_t round_randomly(float x, uint32_t r) {
  const uint32_t u = bits(x), magnitude = u & 0x7FFFFFFF;
  return magnitude > D::kLargest ? D::nearest(x) : static_cast<uint16_t>(D::random(u, magnitude, r));
}

// One coefficient at a time: device code can't index an array of the host's constants.
struct Log {
  template <int I> static constexpr float value = BoxMuller::kLog[I];
};
struct Sin {
  template <int I> static constexpr float value = BoxMuller::kSin[I];
};
struct Cos {
  template <int I> static constexpr float value = BoxMuller::kCos[I];
};

// y x + c, step by step, for c from value<I> down to value<0>.
template <class C, int I>
ZO_HOST_DEVICE inline float horner(float y, float x) {
  y = add(mul(y, x), C::template value<I>);
  if constexpr (I == 0) {
    return y;
  } else {
    return horner<C, I - 1>(y, x);
  }
}
template <class C, int N>
ZO_HOST_DEVICE inline float polynomial(float x) {
  return horner<C, N - 2>(C::template value<N - 1>, x);
}

// sqrt(-2 log(u)), u = (word | 1) / 2^32
ZO_HOST_DEVICE inline float radius(uint32_t word) {
  const uint32_t offset = bits(from_u32(word | 1)) - (BoxMuller::kSqrtHalfBits + BoxMuller::kExponent32);
  const float exponent = from_i32(static_cast<int32_t>(offset) >> 23);
  const float t = add(floats((offset & 0x7FFFFF) + BoxMuller::kSqrtHalfBits), -1.0f);
  return sqrt(add(mul(exponent, BoxMuller::kMinus2Ln2), mul(t, polynomial<Log, 8>(t))));
}

// Two normals of two words: the angle has bits 0..29 in [-pi/4, pi/4), bits 30 and 31 the quarter.
ZO_HOST_DEVICE inline void normal_pair(uint32_t radius_word, uint32_t angle_word, float& x, float& y) {
  const float f = mul(from_i32(static_cast<int32_t>(angle_word << 2)), 0x1p-31f);
  const float square = mul(f, f);
  const float sin = mul(f, polynomial<Sin, 4>(square));
  const float cos = floats(bits(polynomial<Cos, 4>(square)) ^ (angle_word & 0x80000000u));
  const bool swap = angle_word >> 30 & 1;
  const float r = radius(radius_word);
  x = mul(r, swap ? sin : cos);
  y = mul(r, swap ? cos : sin);
}

ZO_HOST_DEVICE inline Words words(uint64_t seed, uint32_t stream, uint64_t draw, uint32_t block) {
  return philox4x32({{block, stream, static_cast<uint32_t>(draw), static_cast<uint32_t>(draw >> 32)}}, seed);
}

}  // namespace zo::cuda
