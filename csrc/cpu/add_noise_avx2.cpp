// SPDX-License-Identifier: Apache-2.0
// Needs AVX2 and F16C.
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
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static U add(U a, U b) { return _mm256_add_epi32(a, b); }
  static U sub(U a, U b) { return _mm256_sub_epi32(a, b); }
  static U bit_and(U a, U b) { return _mm256_and_si256(a, b); }
  static U bit_or(U a, U b) { return _mm256_or_si256(a, b); }
  static U bit_xor(U a, U b) { return _mm256_xor_si256(a, b); }
  template <int N> static U shift_left(U a) { return _mm256_slli_epi32(a, N); }
  template <int N> static U shift_right(U a) { return _mm256_srli_epi32(a, N); }
  template <int N> static U shift_right_signed(U a) { return _mm256_srai_epi32(a, N); }
  static void mulhilo(U a, uint32_t m, U& hi, U& lo) {
    const U even = _mm256_mul_epu32(a, set(m));
    const U odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), set(m));
    hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    lo = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
  static F from_u32(U a) {  // exact 16-bit halves: one rounding, in the sum
    const F high = _mm256_cvtepi32_ps(shift_right<16>(a));
    const F low = _mm256_cvtepi32_ps(bit_and(a, set(0xFFFFu)));
    return add(mul(high, set(65536.0f)), low);
  }
  static F from_i32(U a) { return _mm256_cvtepi32_ps(a); }
  static U bits(F a) { return _mm256_castps_si256(a); }
  static F floats(U a) { return _mm256_castsi256_ps(a); }
  static F select_sign(U sign, F if_set, F otherwise) {
    return _mm256_blendv_ps(otherwise, if_set, floats(sign));
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
  static void store_bf16(uint16_t* p, F x) {
    const U u = bits(x), odd = bit_and(shift_right<16>(u), set(1u));
    const F rounded = floats(add(add(u, set(0x7FFFu)), odd));
    const F quiet = floats(bit_or(u, set(0x400000u)));
    const F nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const U out = shift_right<16>(bits(_mm256_blendv_ps(rounded, quiet, nan)));
    const __m128i low = _mm256_castsi256_si128(out), high = _mm256_extracti128_si256(out, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
  static F load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_f16(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace
}  // namespace zo::cpu

#include "cpu/add_noise.inl"

namespace zo::cpu {
void add_noise_avx2(void* p, Dtype dtype, int64_t first, int64_t n, const NoiseTerms& terms) {
  dispatch_dtype(p, dtype, first, n, terms);
}
}  // namespace zo::cpu
