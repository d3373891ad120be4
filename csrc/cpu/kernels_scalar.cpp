// SPDX-License-Identifier: Apache-2.0
#include "cpu/v_scalar.h"

namespace zo::cpu {
namespace {

struct D {
  static constexpr int kRows = 1, kVectors = 4;
  static uint32_t broadcast(const int8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return four;
  }
  static void keep(uint32_t&) {}
  static float fma(float a, float b, float c) { return std::fma(a, b, c); }
  static uint32_t multiply(uint32_t a, uint32_t b) { return a * b; }
  static uint32_t nearest(float x) { return static_cast<uint32_t>(static_cast<int32_t>(std::lrint(x))); }
  static void store_codes(int8_t* p, uint32_t x) { *p = static_cast<int8_t>(x); }
  static float clamp(float x, float low, float high) {
    const float risen = x > low ? x : low;
    return risen < high ? risen : high;
  }
  static int32_t total(uint32_t x) { return static_cast<int32_t>(x); }
  static float above(float a, float b) { return a > b ? a : b; }
  static uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
  static uint32_t largest(uint32_t x) { return x; }

  template <int kBias>
  struct Lanes {
    static constexpr int32_t kOffset = kBias;
    uint32_t u;
    static Lanes load(const uint8_t* p) {
      Lanes out;
      std::memcpy(&out.u, p, 4);
      return out;
    }
    static uint32_t dot(uint32_t acc, Lanes w, uint32_t x) {
      for (int shift = 0; shift < 32; shift += 8) {
        acc += static_cast<uint32_t>(static_cast<int8_t>(x >> shift) * static_cast<int32_t>(w.u >> shift & 0xFF));
      }
      return acc;
    }
  };
  using Wide = Lanes<128>;
  using Narrow = Lanes<8>;
  struct Pairs {
    uint32_t u;
    static Pairs load(const uint8_t* p) {
      Pairs out;
      std::memcpy(&out.u, p, 4);
      return out;
    }
    static uint32_t dot(uint32_t acc, Pairs w, uint32_t x) {
      for (int shift = 0; shift < 32; shift += 16) {
        acc += static_cast<uint32_t>(static_cast<int16_t>(x >> shift) * static_cast<int16_t>(w.u >> shift));
      }
      return acc;
    }
  };
};

}  // namespace
}  // namespace zo::cpu

#include "cpu/kernels.inl"

namespace zo::cpu {
const Kernels kernels_scalar = kAll;
}  // namespace zo::cpu
