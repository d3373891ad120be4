// SPDX-License-Identifier: Apache-2.0
// The noise of a group of 128 elements for one instruction set. Include it behind a struct `V` of W = 1, 8 or
// 16 lanes, with vectors V::F of W floats and V::U of W words; lane_numbers() is 0, 1, ..., W - 1.
//
// 64 normals come from 16 Philox blocks: output j of block l is element 16 j + l. W blocks lie side by side
// in the lanes, so each output is a vector of consecutive elements and nothing is interleaved. The random
// bits of 128 roundings come from 16 blocks likewise.
//
// Every float operation is a separate correctly rounded instruction (-ffp-contract=off), in the order of
// zo_kernels/rng.py.

#include "common/philox.h"

namespace zo::cpu {
namespace {

constexpr int W = V::kWidth;
using F = V::F;
using U = V::U;

constexpr int kGroup = 128;
constexpr int kVectors = kGroup / W;  // vector v holds elements v W .. v W + W - 1 of a group
constexpr int kRow = 16 / W;          // vectors of the 16 elements that the blocks side by side fill

// What of Philox is the same for all blocks of a (seed, stream, draw): round keys, and rounds 1 to 3 as far
// as they don't depend on the block.
struct Source {
  // Constants that are read from memory: spreading an immediate over the lanes takes a port from the shuffles.
  uint32_t multiplier0 = Philox::kMultiplier0, multiplier1 = Philox::kMultiplier1, one = 1;
  // Minus the bits of x, it has the exponent -e of `octaves`.
  uint32_t reverse = BoxMuller::kSqrtHalfBits + (128u << 23) - 1;
  uint32_t key0[Philox::kRounds], key1[Philox::kRounds];
  uint32_t round1, round2, round3;  // what c2 is xored with
  uint32_t round2_c0;               // and c0, in round 2

  explicit Source(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < Philox::kRounds; ++round, k0 += Philox::kWeyl0, k1 += Philox::kWeyl1) {
      key0[round] = k0;
      key1[round] = k1;
    }
  }
  void aim(uint32_t stream, uint64_t draw) {
    const uint64_t p1 = uint64_t{Philox::kMultiplier1} * static_cast<uint32_t>(draw);
    round1 = static_cast<uint32_t>(draw >> 32) ^ key1[0];
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ stream ^ key0[0];  // after round 1
    const uint64_t p0 = uint64_t{Philox::kMultiplier0} * c0;
    round2_c0 = static_cast<uint32_t>(p1) ^ key0[1];
    round2 = static_cast<uint32_t>(p0 >> 32) ^ key1[1];
    round3 = static_cast<uint32_t>(p0) ^ key1[2];
  }
};

// Words of blocks first[i] .. first[i] + W - 1 for N sets of them, which hide each other's latency.
//
// The 64-bit products of a round stay as they are, even and odd lanes apart; only the last words are
// interleaved.
template <int N>
inline void philox(U (&w)[N][4], const uint32_t (&first)[N], const Source& s) {
  using Wide = V::Wide;
  const U m0 = V::set(s.multiplier0), m1 = V::set(s.multiplier1);
  // Both products of a round and of the one before. In rounds 1 and 2 one of both is the same for all blocks.
  Wide p0[N], p1[N], before0[N], before1[N];
  for (int i = 0; i < N; ++i) {
    before0[i] = V::times(V::split(V::add(V::set(first[i]), V::lane_numbers())), m0);
    before1[i] = V::times(V::split(V::bit_xor(V::high(before0[i]), V::set(s.round1))), m1);
  }
  for (int i = 0; i < N; ++i) {  // round 3
    p0[i] = V::times(V::split(V::bit_xor(V::high(before1[i]), V::set(s.round2_c0))), m0);
    p1[i] = V::times(V::split(V::bit_xor(V::low(before0[i]), V::set(s.round2))), m1);
  }
  for (int i = 0; i < N; ++i) {  // round 4
    const Wide c0 = V::high_xor(p1[i], before1[i], V::set(s.key0[2]));
    before0[i] = p0[i], before1[i] = p1[i];
    p1[i] = V::times(V::split(V::bit_xor(V::high(p0[i]), V::set(s.round3))), m1);
    p0[i] = V::times(c0, m0);
  }
#pragma GCC unroll 6
  for (int round = 4; round < Philox::kRounds; ++round) {
    for (int i = 0; i < N; ++i) {
      const Wide c0 = V::high_xor(p1[i], before1[i], V::set(s.key0[round - 1]));
      const Wide c2 = V::high_xor(p0[i], before0[i], V::set(s.key1[round - 1]));
      before0[i] = p0[i], before1[i] = p1[i];
      p0[i] = V::times(c0, m0);
      p1[i] = V::times(c2, m1);
    }
  }
  constexpr int kLast = Philox::kRounds - 1;
  for (int i = 0; i < N; ++i) {
    w[i][0] = V::xor3(V::high(p1[i]), V::low(before1[i]), V::set(s.key0[kLast]));
    w[i][1] = V::low(p1[i]);
    w[i][2] = V::xor3(V::high(p0[i]), V::low(before0[i]), V::set(s.key1[kLast]));
    w[i][3] = V::low(p0[i]);
  }
}

// The functions below take M vectors in step, and `keep` holds the compiler to that order. It would finish one
// chain after the other, and a chain waits for its last result most of the time.
template <int M, int N>
inline void horner(F (&y)[M], const F (&x)[M], const float (&c)[N]) {
  for (int i = 0; i < M; ++i) y[i] = V::keep(V::mul(x[i], V::set(c[N - 1])));
  for (int i = 0; i < M; ++i) y[i] = V::keep(V::add(y[i], V::set(c[N - 2])));
#pragma GCC unroll 6
  for (int j = N - 3; j >= 0; --j) {
    for (int i = 0; i < M; ++i) y[i] = V::keep(V::mul(y[i], x[i]));
    for (int i = 0; i < M; ++i) y[i] = V::keep(V::add(y[i], V::set(c[j])));
  }
}

// x = m 2^e, sqrt(1/2) <= m < sqrt(2), for x in [1, 2^32]: m and the rounded product (32 - e) kMinus2Ln2.
template <class X>
inline void octaves(F x, F& m, F& w, const Source& s) {
  if constexpr (X::kHasScale) {
    const F minus_e = X::exponent(V::floats(V::sub(V::set(s.reverse), V::bits(x))));
    m = X::scale(x, minus_e);
    // 32 kMinus2Ln2 is exact: so is what is rounded here.
    w = X::fma(minus_e, V::set(float{BoxMuller::kMinus2Ln2}), V::set(32 * BoxMuller::kMinus2Ln2));
  } else {
    const U offset = V::sub(V::bits(x), V::set(BoxMuller::kSqrtHalfBits + BoxMuller::kExponent32));
    const F exponent = V::from_i32(V::template shift_right_signed<23>(offset));
    w = V::mul(exponent, V::set(-BoxMuller::kMinus2Ln2));
    const U fraction = V::bit_and(offset, V::set(0x7FFFFFu));
    m = V::floats(V::add(fraction, V::set(uint32_t{BoxMuller::kSqrtHalfBits})));
  }
}

// sqrt(-2 log(u)), u = (word | 1) / 2^32
template <int M>
inline void radius(F (&r)[M], const U (&word)[M], const Source& s) {
  F x[M], m[M], w[M], t[M], log[M];
  for (int i = 0; i < M; ++i) x[i] = V::from_u32(V::bit_or(word[i], V::set(s.one)));
  for (int i = 0; i < M; ++i) octaves<V>(x[i], m[i], w[i], s);
  for (int i = 0; i < M; ++i) t[i] = V::add(m[i], V::set(-1.0f));
  horner(log, t, BoxMuller::kLog);
  for (int i = 0; i < M; ++i) r[i] = V::sqrt(V::sub(V::mul(t[i], log[i]), w[i]));
}

// A point on the unit circle: bits 0..29 an angle in [-pi/4, pi/4), bits 30 and 31 the quarter.
template <int M>
inline void direction(F (&x)[M], F (&y)[M], const U (&word)[M]) {
  F f[M], square[M], sin[M], cos[M];
  for (int i = 0; i < M; ++i) {
    f[i] = V::mul(V::from_i32(V::template shift_left<2>(word[i])), V::set(0x1p-31f));
    square[i] = V::mul(f[i], f[i]);
  }
  horner(sin, square, BoxMuller::kSin);
  horner(cos, square, BoxMuller::kCos);
  for (int i = 0; i < M; ++i) {
    sin[i] = V::mul(f[i], sin[i]);
    const U sign = V::bit_and(word[i], V::set(0x80000000u));
    cos[i] = V::floats(V::bit_xor(V::bits(cos[i]), sign));
    V::select_bit30(word[i], sin[i], cos[i], x[i], y[i]);
  }
}

// 128 normals. Its own function: one copy serves all ops and dtypes, and has all registers.
__attribute__((noinline)) void normals(F (&z)[kVectors], uint32_t group, const Source& s) {
  for (int lane = 0; lane < kRow; ++lane) {
    U w[2][4];
    const uint32_t first = 32 * group + lane * W;
    philox<2>(w, {first, first + 16}, s);
    constexpr int kPairs = 4;
    F r[kPairs], x[kPairs], y[kPairs];
    radius(r, {w[0][0], w[0][2], w[1][0], w[1][2]}, s);
    direction(x, y, {w[0][1], w[0][3], w[1][1], w[1][3]});
    for (int pair = 0; pair < kPairs; ++pair) {
      z[2 * pair * kRow + lane] = V::mul(r[pair], x[pair]);
      z[(2 * pair + 1) * kRow + lane] = V::mul(r[pair], y[pair]);
    }
  }
}

// 128 integers in [0, 2^16).
__attribute__((noinline)) void round_bits(U (&r)[kVectors], uint32_t group, const Source& s) {
  for (int lane = 0; lane < kRow; ++lane) {
    U w[1][4];
    philox<1>(w, {16 * group + lane * W}, s);
    for (int j = 0; j < 4; ++j) {
      r[j * kRow + lane] = V::bit_and(w[0][j], V::set(0xFFFFu));
      r[(4 + j) * kRow + lane] = V::template shift_right<16>(w[0][j]);
    }
  }
}

}  // namespace
}  // namespace zo::cpu
