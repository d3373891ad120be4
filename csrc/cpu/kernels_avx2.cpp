// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cpu/v_avx2.h"

namespace zo::cpu {
namespace {

// Needs FMA.
struct D {
  static constexpr int kRows = 3, kVectors = 2;
  static __m256i broadcast(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static void keep(__m256i& x) { asm volatile("" : "+x"(x)); }
  static __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
  static __m256i multiply(__m256i a, __m256i b) { return _mm256_mullo_epi32(a, b); }
  static __m256i nearest(__m256 x) { return _mm256_cvtps_epi32(x); }
  static void store_codes(int8_t* p, __m256i x) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  static __m256 clamp(__m256 x, float low, float high) {
    return _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(low)), _mm256_set1_ps(high));
  }
  static int32_t total(__m256i x) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), x);
    int32_t sum = 0;
    for (int32_t lane : lanes) sum += lane;
    return sum;
  }
  static __m256 above(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
  static __m256i larger(__m256i a, __m256i b) { return _mm256_max_epu32(a, b); }
  static uint32_t largest(__m256i x) {
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), x);
    return *std::max_element(lanes, lanes + 8);
  }
  // Sums of four products of bytes. The 16-bit sums of two saturate where both factors reach 255.
  static __m256i dot(__m256i acc, __m256i unsigned_bytes, __m256i signed_bytes) {
    const __m256i pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  // So the signs move to the activations, which leaves magnitudes of at most 128 and 127.
  struct Wide {
    static constexpr int32_t kOffset = 0;
    __m256i q, magnitude;
    static Wide load(const uint8_t* p) {
      const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      const __m256i q = _mm256_xor_si256(u, _mm256_set1_epi8(-128));
      return {q, _mm256_abs_epi8(q)};
    }
    static __m256i dot(__m256i acc, const Wide& w, __m256i x) {
      return D::dot(acc, w.magnitude, _mm256_sign_epi8(x, w.q));
    }
  };
  struct Pairs {
    __m256i u;
    static Pairs load(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
    static __m256i dot(__m256i acc, const Pairs& w, __m256i x) {
      return _mm256_add_epi32(acc, _mm256_madd_epi16(w.u, x));
    }
  };
  struct Narrow {  // at most 15
    static constexpr int32_t kOffset = 8;
    __m256i u;
    static Narrow load(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
    static __m256i dot(__m256i acc, const Narrow& w, __m256i x) { return D::dot(acc, w.u, x); }
  };
};

}  // namespace
}  // namespace zo::cpu

#include "cpu/kernels.inl"

namespace zo::cpu {
const Kernels kernels_avx2 = kAll;
}  // namespace zo::cpu
