// SPDX-License-Identifier: Apache-2.0
// `V` of 16 lanes. Needs AVX-512 F, BW, DQ, VL and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace zo::cpu {
namespace {

struct V {
  static constexpr int kWidth = 16;
  using F = __m512;
  using U = __m512i;
  static F set(float x) { return _mm512_set1_ps(x); }
  static U set(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static U lane_numbers() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static U add(U a, U b) { return _mm512_add_epi32(a, b); }
  static U sub(U a, U b) { return _mm512_sub_epi32(a, b); }
  static U bit_and(U a, U b) { return _mm512_and_si512(a, b); }
  static U bit_or(U a, U b) { return _mm512_or_si512(a, b); }
  static U bit_xor(U a, U b) { return _mm512_xor_si512(a, b); }
  static U xor3(U a, U b, U c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  template <int N> static U shift_left(U a) { return _mm512_slli_epi32(a, N); }
  template <int N> static U shift_right(U a) { return _mm512_srli_epi32(a, N); }
  template <int N> static U shift_right_signed(U a) { return _mm512_srai_epi32(a, N); }
  // 64-bit products; as a factor, what the low words of its halves hold.
  struct Wide {
    U even, odd;  // of lanes 0, 2, ... and 1, 3, ...
  };
  static Wide split(U a) { return {a, _mm512_srli_epi64(a, 32)}; }
  static Wide times(Wide a, U m) { return {_mm512_mul_epu32(a.even, m), _mm512_mul_epu32(a.odd, m)}; }
  static U high(Wide a) { return _mm512_mask_shuffle_epi32(a.odd, 0x5555, a.even, _MM_PERM_DDBB); }
  static U low(Wide a) { return _mm512_mask_shuffle_epi32(a.even, 0xAAAA, a.odd, _MM_PERM_CCAA); }
  // high(a) ^ low(b) ^ key; one half is shifted and one shuffled, because each has a port of its own.
  static Wide high_xor(Wide a, Wide b, U key) {
    return {xor3(_mm512_srli_epi64(a.even, 32), b.even, key),
            xor3(_mm512_shuffle_epi32(a.odd, _MM_PERM_DDBB), b.odd, key)};
  }
  static constexpr bool kHasScale = true;
  static F exponent(F a) { return _mm512_getexp_ps(a); }           // floor(log2(a)) of a normal number
  static F scale(F a, F e) { return _mm512_scalef_ps(a, e); }      // a 2^e
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // only where a b + c is what is meant
  static F keep(F x) {  // x, where the compiler must have it by now
    asm("" : "+v"(x));
    return x;
  }
  static F from_u32(U a) { return _mm512_cvtepu32_ps(a); }
  static F from_i32(U a) { return _mm512_cvtepi32_ps(a); }
  static U bits(F a) { return _mm512_castps_si512(a); }
  static F floats(U a) { return _mm512_castsi512_ps(a); }
  static U truncated(F a) { return _mm512_cvttps_epi32(a); }
  static F sign_of(F a) {
    const F zero = _mm512_setzero_ps();
    const F positive = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, zero, _CMP_GT_OQ), set(1.0f));
    return _mm512_mask_mov_ps(positive, _mm512_cmp_ps_mask(a, zero, _CMP_LT_OQ), set(-1.0f));
  }
  static U if_greater(U a, U b, U yes, U no) {  // a, b < 2^31
    return _mm512_mask_mov_epi32(no, _mm512_cmpgt_epi32_mask(a, b), yes);
  }
  static void select_bit30(U word, F set, F clear, F& x, F& y) {
    const __mmask16 bit = _mm512_test_epi32_mask(word, V::set(1u << 30));
    x = _mm512_mask_blend_ps(bit, clear, set);
    y = _mm512_mask_blend_ps(bit, set, clear);
  }
  static F sign_by_bits(uint32_t bits16, F x) {
    const U sign = _mm512_maskz_set1_epi32(static_cast<__mmask16>(bits16), INT32_MIN);
    return floats(bit_xor(bits(x), sign));
  }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F load_bf16(const uint16_t* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return floats(shift_left<16>(_mm512_cvtepu16_epi32(h)));
  }
  static U load_words(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_words(int32_t* p, U x) { _mm512_storeu_si512(p, x); }
  static void store_u16(uint16_t* p, U x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
  }
  static U bf16_bits(F x) {
    const U u = bits(x), odd = bit_and(shift_right<16>(u), set(1u));
    const U rounded = add(add(u, set(0x7FFFu)), odd);
    const U quiet = bit_or(u, set(0x400000u));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return shift_right<16>(_mm512_mask_blend_epi32(nan, rounded, quiet));
  }
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m256i to_f16(F x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static U f16_bits(F x) { return _mm512_cvtepu16_epi32(to_f16(x)); }
  static void store_f16(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(x));
  }
};

}  // namespace
}  // namespace zo::cpu
