// SPDX-License-Identifier: Apache-2.0
// `V` of one lane, in portable C++.
#pragma once

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
  static F sub(F a, F b) { return a - b; }
  static F div(F a, F b) { return a / b; }
  static F sqrt(F a) { return std::sqrt(a); }
  static U add(U a, U b) { return a + b; }
  static U sub(U a, U b) { return a - b; }
  static U bit_and(U a, U b) { return a & b; }
  static U bit_or(U a, U b) { return a | b; }
  static U bit_xor(U a, U b) { return a ^ b; }
  static U xor3(U a, U b, U c) { return a ^ b ^ c; }
  template <int N> static U shift_left(U a) { return a << N; }
  template <int N> static U shift_right(U a) { return a >> N; }
  template <int N> static U shift_right_signed(U a) { return static_cast<U>(static_cast<int32_t>(a) >> N); }
  // 64-bit products; as a factor, what the low words of its halves hold.
  using Wide = uint64_t;
  static Wide split(U a) { return a; }
  static Wide times(Wide a, U m) { return (a & 0xFFFFFFFF) * m; }
  static U high(Wide a) { return static_cast<U>(a >> 32); }
  static U low(Wide a) { return static_cast<U>(a); }
  static Wide high_xor(Wide a, Wide b, U key) { return high(a) ^ low(b) ^ key; }
  static constexpr bool kHasScale = false;
  static F keep(F x) { return x; }
  static F from_u32(U a) { return static_cast<float>(a); }
  static F from_i32(U a) { return static_cast<float>(static_cast<int32_t>(a)); }
  static U bits(F a) { return bits_of(a); }
  static F floats(U a) { return float_of(a); }
  static U truncated(F a) { return static_cast<U>(a); }
  static F sign_of(F a) { return static_cast<float>(a > 0.0f) - static_cast<float>(a < 0.0f); }
  static U if_greater(U a, U b, U yes, U no) { return a > b ? yes : no; }  // a, b < 2^31
  static void select_bit30(U word, F set, F clear, F& x, F& y) {
    const bool bit = word >> 30 & 1;
    x = bit ? set : clear;
    y = bit ? clear : set;
  }
  static F sign_by_bits(uint32_t bits, F x) { return bits & 1 ? -x : x; }
  static F load(const float* p) { return *p; }
  static void store(float* p, F x) { *p = x; }
  static F load_bf16(const uint16_t* p) { return bf16_to_float(*p); }
  static U load_words(const int32_t* p) { return static_cast<U>(*p); }
  static void store_words(int32_t* p, U x) { *p = static_cast<int32_t>(x); }
  static void store_u16(uint16_t* p, U x) { *p = static_cast<uint16_t>(x); }
  static U bf16_bits(F x) { return float_to_bf16(x); }
  static F load_f16(const uint16_t* p) { return f16_to_float(*p); }
  static void store_f16(uint16_t* p, F x) { *p = float_to_f16(x); }
  static U f16_bits(F x) { return float_to_f16(x); }
};

}  // namespace
}  // namespace zo::cpu
