// SPDX-License-Identifier: Apache-2.0
#include "cpu/v_avx512.h"

namespace zo::cpu {
namespace {

// Needs AVX-512 VNNI.
struct D {
  static constexpr int kRows = 6, kVectors = 4;
  static __m512i broadcast(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static void keep(__m512i& x) { asm volatile("" : "+v"(x)); }
  static __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
  static __m512i multiply(__m512i a, __m512i b) { return _mm512_mullo_epi32(a, b); }
  static __m512i nearest(__m512 x) { return _mm512_cvtps_epi32(x); }
  static void store_codes(int8_t* p, __m512i x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x));
  }
  static __m512 clamp(__m512 x, float low, float high) {
    return _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(low)), _mm512_set1_ps(high));
  }
  static int32_t total(__m512i x) { return _mm512_reduce_add_epi32(x); }
  static __m512 above(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
  static __m512i larger(__m512i a, __m512i b) { return _mm512_max_epu32(a, b); }
  static uint32_t largest(__m512i x) { return _mm512_reduce_max_epu32(x); }

  template <int kBias>
  struct Lanes {
    static constexpr int32_t kOffset = kBias;
    __m512i u;
    static Lanes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
    static __m512i dot(__m512i acc, Lanes w, __m512i x) {
      // By hand: gcc 12 copies accumulators between registers around the intrinsic.
      asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w.u), "v"(x));
      return acc;
    }
  };
  using Wide = Lanes<128>;
  using Narrow = Lanes<8>;
  struct Pairs {
    __m512i u;
    static Pairs load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
    static __m512i dot(__m512i acc, Pairs w, __m512i x) {
      asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(w.u), "v"(x));
      return acc;
    }
  };
};

}  // namespace
}  // namespace zo::cpu

#include "cpu/kernels.inl"

namespace zo::cpu {
const Kernels kernels_avx512 = kAll;
}  // namespace zo::cpu
