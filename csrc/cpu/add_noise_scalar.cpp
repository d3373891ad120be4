// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "cpu/half.h"

namespace zo::cpu {
namespace {

struct V {
  static constexpr int kWidth = 1;
  using F = float;
  using U = uint32_t;
  static F set(float x) { return x; }
  static U set(uint32_t x) { return x; }
  static U lane_numbers() { return 0; }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static F sqrt(F a) { return std::sqrt(a); }
  static U add(U a, U b) { return a + b; }
  static U sub(U a, U b) { return a - b; }
  static U bit_and(U a, U b) { return a & b; }
  static U bit_or(U a, U b) { return a | b; }
  static U bit_xor(U a, U b) { return a ^ b; }
  template <int N> static U shift_left(U a) { return a << N; }
  template <int N> static U shift_right(U a) { return a >> N; }
  template <int N> static U shift_right_signed(U a) { return static_cast<U>(static_cast<int32_t>(a) >> N); }
  static void mulhilo(U a, uint32_t m, U& hi, U& lo) {
    const uint64_t product = uint64_t{a} * m;
    hi = static_cast<U>(product >> 32);
    lo = static_cast<U>(product);
  }
  static F from_u32(U a) { return static_cast<float>(a); }
  static F from_i32(U a) { return static_cast<float>(static_cast<int32_t>(a)); }
  static U bits(F a) { return bits_of(a); }
  static F floats(U a) { return float_of(a); }
  static F select_sign(U sign, F if_set, F otherwise) { return sign >> 31 ? if_set : otherwise; }
  static F sign_by_bits(uint32_t bits, F x) { return bits & 1 ? -x : x; }
  static F load(const float* p) { return *p; }
  static void store(float* p, F x) { *p = x; }
  static F load_bf16(const uint16_t* p) { return bf16_to_float(*p); }
  static void store_bf16(uint16_t* p, F x) { *p = float_to_bf16(x); }
  static F load_f16(const uint16_t* p) { return f16_to_float(*p); }
  static void store_f16(uint16_t* p, F x) { *p = float_to_f16(x); }
};

}  // namespace
}  // namespace zo::cpu

#include "cpu/add_noise.inl"

namespace zo::cpu {
void add_noise_scalar(void* p, Dtype dtype, int64_t first, int64_t n, const NoiseTerms& terms) {
  dispatch_dtype(p, dtype, first, n, terms);
}
}  // namespace zo::cpu
