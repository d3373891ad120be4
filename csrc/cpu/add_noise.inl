// SPDX-License-Identifier: Apache-2.0
// Body of add_noise for one instruction set. Include it behind a struct `V` of W = 1, 8 or 16 lanes, with
// vectors V::F of W floats and V::U of W words; lane_numbers() is 0, 1, ..., W - 1.
//
// 64 normals come from 16 Philox blocks: output j of block l is element 16 j + l. W blocks lie side by side
// in the lanes, so each output is a vector of consecutive elements and nothing is interleaved.
//
// Every float operation is a separate correctly rounded instruction (-ffp-contract=off), in the order of
// zo_kernels/rng.py.

#include <cstring>

#include "common/philox.h"
#include "cpu/add_noise.h"
#include "cpu/half.h"

namespace zo::cpu {
namespace {

constexpr int W = V::kWidth;
using F = V::F;
using U = V::U;

struct Block4 {
  U w[4];
};

inline Block4 philox(U block, uint32_t stream, uint64_t draw, uint64_t seed) {
  U c0 = block, c1 = V::set(stream);
  U c2 = V::set(static_cast<uint32_t>(draw)), c3 = V::set(static_cast<uint32_t>(draw >> 32));
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < Philox::kRounds; ++round) {
    U hi0, lo0, hi1, lo1;
    V::mulhilo(c0, Philox::kMultiplier0, hi0, lo0);
    V::mulhilo(c2, Philox::kMultiplier1, hi1, lo1);
    c0 = V::bit_xor(V::bit_xor(hi1, c1), V::set(k0));
    c1 = lo1;
    c2 = V::bit_xor(V::bit_xor(hi0, c3), V::set(k1));
    c3 = lo0;
    k0 += Philox::kWeyl0;
    k1 += Philox::kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

template <int N>
inline F horner(F x, const float (&c)[N]) {
  F y = V::add(V::mul(x, V::set(c[N - 1])), V::set(c[N - 2]));
  for (int i = N - 3; i >= 0; --i) y = V::add(V::mul(y, x), V::set(c[i]));
  return y;
}

// sqrt(-2 log(u)), u = (word | 1) / 2^32
inline F radius(U word) {
  const U bits = V::bits(V::from_u32(V::bit_or(word, V::set(1u))));
  const U offset = V::sub(bits, V::set(BoxMuller::kSqrtHalfBits + BoxMuller::kExponent32));
  const F exponent = V::from_i32(V::template shift_right_signed<23>(offset));
  const U fraction = V::bit_and(offset, V::set(0x7FFFFFu));
  const U mantissa = V::add(fraction, V::set(uint32_t{BoxMuller::kSqrtHalfBits}));
  const F t = V::add(V::floats(mantissa), V::set(-1.0f));
  return V::sqrt(V::add(V::mul(exponent, V::set(float{BoxMuller::kMinus2Ln2})),
                        V::mul(t, horner(t, BoxMuller::kLog))));
}

// A point on the unit circle: bits 0..29 an angle in [-pi/4, pi/4), bits 30 and 31 the quarter.
inline void direction(U word, F& x, F& y) {
  const F f = V::mul(V::from_i32(V::template shift_left<2>(word)), V::set(0x1p-31f));
  const F square = V::mul(f, f);
  const F sin = V::mul(f, horner(square, BoxMuller::kSin));
  const U sign = V::bit_and(word, V::set(0x80000000u));
  const F cos = V::floats(V::bit_xor(V::bits(horner(square, BoxMuller::kCos)), sign));
  const U swap = V::template shift_left<1>(word);  // bit 30 as the sign bit
  x = V::select_sign(swap, sin, cos);
  y = V::select_sign(swap, cos, sin);
}

// acc[j]: elements 16 j .. 16 j + W - 1 of a group, made by blocks first .. first + W - 1.
inline void add_normal(F (&acc)[4], uint32_t first, uint64_t draw, F scale, const NoiseTerms& t) {
  const Block4 b = philox(V::add(V::set(first), V::lane_numbers()), t.stream, draw, t.seed);
  for (int pair = 0; pair < 2; ++pair) {
    F x, y;
    const F r = radius(b.w[2 * pair]);
    direction(b.w[2 * pair + 1], x, y);
    acc[2 * pair] = V::add(acc[2 * pair], V::mul(scale, V::mul(r, x)));
    acc[2 * pair + 1] = V::add(acc[2 * pair + 1], V::mul(scale, V::mul(r, y)));
  }
}

struct F32 {
  using T = float;
  static F load(const T* p) { return V::load(p); }
  static void store(T* p, F x) { V::store(p, x); }
};
struct Bf16 {
  using T = uint16_t;
  static F load(const T* p) { return V::load_bf16(p); }
  static void store(T* p, F x) { V::store_bf16(p, x); }
};
struct F16 {
  using T = uint16_t;
  static F load(const T* p) { return V::load_f16(p); }
  static void store(T* p, F x) { V::store_f16(p, x); }
};

// One group of 64 elements at p; `block` is the first of its 16 blocks.
template <class D>
inline void normal_group(typename D::T* p, uint32_t block, const NoiseTerms& t) {
  for (int lane = 0; lane < 16; lane += W) {
    F acc[4];
    for (int j = 0; j < 4; ++j) acc[j] = V::mul(D::load(p + 16 * j + lane), V::set(t.decay));
    for (int64_t k = 0; k < t.count; ++k) {
      add_normal(acc, block + lane, static_cast<uint64_t>(t.draws[k]), V::set(t.scales[k]), t);
    }
    for (int j = 0; j < 4; ++j) D::store(p + 16 * j + lane, acc[j]);
  }
}

// One block of 128 elements at p.
template <class D>
inline void sign_group(typename D::T* p, uint32_t block, const NoiseTerms& t) {
  constexpr int kVectors = 128 / W, kPerWord = 32 / W;
  F acc[kVectors];
  for (int v = 0; v < kVectors; ++v) acc[v] = V::mul(D::load(p + v * W), V::set(t.decay));
  for (int64_t j = 0; j < t.count; ++j) {
    const uint64_t draw = static_cast<uint64_t>(t.draws[j]);
    const Words words = philox4x32({{block, t.stream, static_cast<uint32_t>(draw),
                                     static_cast<uint32_t>(draw >> 32)}},
                                   t.seed);
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t bits = words.w[v / kPerWord] >> (v % kPerWord * W);
      acc[v] = V::add(acc[v], V::sign_by_bits(bits, V::set(t.scales[j])));
    }
  }
  for (int v = 0; v < kVectors; ++v) D::store(p + v * W, acc[v]);
}

template <class D, int64_t kGroup, int64_t kBlocks,
          void (*kernel)(typename D::T*, uint32_t, const NoiseTerms&)>
inline void each_group(typename D::T* p, int64_t first, int64_t n, const NoiseTerms& t) {
  const auto block = [&](int64_t i) { return static_cast<uint32_t>((first + i) / kGroup * kBlocks); };
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) kernel(p + i, block(i), t);
  if (i < n) {  // the tail, padded in a buffer
    typename D::T padded[kGroup] = {};
    std::memcpy(padded, p + i, (n - i) * sizeof(*p));
    kernel(padded, block(i), t);
    std::memcpy(p + i, padded, (n - i) * sizeof(*p));
  }
}

template <class D>
void run(void* p, int64_t first, int64_t n, const NoiseTerms& terms) {
  auto* typed = static_cast<typename D::T*>(p);
  if (terms.kind == Kind::normal) {
    each_group<D, group_of(Kind::normal), 16, normal_group<D>>(typed, first, n, terms);
  } else {
    each_group<D, group_of(Kind::rademacher), 1, sign_group<D>>(typed, first, n, terms);
  }
}

void dispatch_dtype(void* p, Dtype dtype, int64_t first, int64_t n, const NoiseTerms& terms) {
  switch (dtype) {
    case Dtype::f32: return run<F32>(p, first, n, terms);
    case Dtype::bf16: return run<Bf16>(p, first, n, terms);
    case Dtype::f16: return run<F16>(p, first, n, terms);
  }
}

}  // namespace
}  // namespace zo::cpu
