// SPDX-License-Identifier: Apache-2.0
// `V` of 8 lanes. Needs AVX2 and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace zo::cpu {
namespace {

struct V {
  static constexpr int kWidth = 8;
  using F = __m256;
  using U = __m256i;
  static F set(float x) { return _mm256_set1_ps(x); }
  static U set(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static U lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static U add(U a, U b) { return _mm256_add_epi32(a, b); }
  static U sub(U a, U b) { return _mm256_sub_epi32(a, b); }
  static U bit_and(U a, U b) { return _mm256_and_si256(a, b); }
  static U bit_or(U a, U b) { return _mm256_or_si256(a, b); }
  static U bit_xor(U a, U b) { return _mm256_xor_si256(a, b); }
  static U xor3(U a, U b, U c) { return bit_xor(bit_xor(a, b), c); }
  template <int N> static U shift_left(U a) { return _mm256_slli_epi32(a, N); }
  template <int N> static U shift_right(U a) { return _mm256_srli_epi32(a, N); }
  template <int N> static U shift_right_signed(U a) { return _mm256_srai_epi32(a, N); }
  // 64-bit products; as a factor, what the low words of its halves hold.
  struct Wide {
    U even, odd;  // of lanes 0, 2, ... and 1, 3, ...
  };
  static Wide split(U a) { return {a, _mm256_srli_epi64(a, 32)}; }
  static Wide times(Wide a, U m) { return {_mm256_mul_epu32(a.even, m), _mm256_mul_epu32(a.odd, m)}; }
  static U high(Wide a) { return _mm256_blend_epi32(_mm256_srli_epi64(a.even, 32), a.odd, 0xAA); }
  static U low(Wide a) { return _mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xAA); }
  static Wide high_xor(Wide a, Wide b, U key) {
    return {xor3(_mm256_srli_epi64(a.even, 32), b.even, key), xor3(_mm256_srli_epi64(a.odd, 32), b.odd, key)};
  }
  static constexpr bool kHasScale = false;
  static F keep(F x) {  // x, where the compiler must have it by now
    asm("" : "+x"(x));
    return x;
  }
  static F from_u32(U a) {  // exact 16-bit halves: one rounding, in the sum
    const F high = _mm256_cvtepi32_ps(shift_right<16>(a));
    const F low = _mm256_cvtepi32_ps(bit_and(a, set(0xFFFFu)));
    return add(mul(high, set(65536.0f)), low);
  }
  static F from_i32(U a) { return _mm256_cvtepi32_ps(a); }
  static U bits(F a) { return _mm256_castps_si256(a); }
  static F floats(U a) { return _mm256_castsi256_ps(a); }
  static U truncated(F a) { return _mm256_cvttps_epi32(a); }
  static F sign_of(F a) {
    const F zero = _mm256_setzero_ps(), one = set(1.0f);
    return sub(_mm256_and_ps(_mm256_cmp_ps(a, zero, _CMP_GT_OQ), one),
               _mm256_and_ps(_mm256_cmp_ps(a, zero, _CMP_LT_OQ), one));
  }
  static U if_greater(U a, U b, U yes, U no) {  // a, b < 2^31
    return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(a, b));
  }
  static void select_bit30(U word, F set, F clear, F& x, F& y) {
    const F bit = floats(shift_left<1>(word));
    x = _mm256_blendv_ps(clear, set, bit);
    y = _mm256_blendv_ps(set, clear, bit);
  }
  static F sign_by_bits(uint32_t bits8, F x) {
    const U lanes = _mm256_sllv_epi32(set(bits8), _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24));
    return floats(bit_xor(bits(x), bit_and(lanes, set(0x80000000u))));
  }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F load_bf16(const uint16_t* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return floats(shift_left<16>(_mm256_cvtepu16_epi32(h)));
  }
  static U load_words(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_words(int32_t* p, U x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static void store_u16(uint16_t* p, U x) {
    const __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
  static U bf16_bits(F x) {
    const U u = bits(x), odd = bit_and(shift_right<16>(u), set(1u));
    const F rounded = floats(add(add(u, set(0x7FFFu)), odd));
    const F quiet = floats(bit_or(u, set(0x400000u)));
    const F nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return shift_right<16>(bits(_mm256_blendv_ps(rounded, quiet, nan)));
  }
  static F load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m128i to_f16(F x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static U f16_bits(F x) { return _mm256_cvtepu16_epi32(to_f16(x)); }
  static void store_f16(uint16_t* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16(x)); }
};

}  // namespace
}  // namespace zo::cpu
