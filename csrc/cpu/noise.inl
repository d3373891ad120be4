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
template <int N>
inline void philox(U (&w)[N][4], const uint32_t (&first)[N], const Source& s) {
  U hi0[N], lo0[N], hi1[N], lo1[N];
  for (int i = 0; i < N; ++i) {  // rounds 1 and 2: one of both products is the same for all blocks
    V::mulhilo(V::add(V::set(first[i]), V::lane_numbers()), Philox::kMultiplier0, hi0[i], lo0[i]);
    V::mulhilo(V::bit_xor(hi0[i], V::set(s.round1)), Philox::kMultiplier1, hi1[i], lo1[i]);
    w[i][0] = V::bit_xor(hi1[i], V::set(s.round2_c0));
    w[i][1] = lo1[i];
    w[i][2] = V::bit_xor(lo0[i], V::set(s.round2));
  }
  for (int round = 2; round < Philox::kRounds; ++round) {
    for (int i = 0; i < N; ++i) V::mulhilo(w[i][0], Philox::kMultiplier0, hi0[i], lo0[i]);
    for (int i = 0; i < N; ++i) V::mulhilo(w[i][2], Philox::kMultiplier1, hi1[i], lo1[i]);
    for (int i = 0; i < N; ++i) {
      w[i][0] = V::xor3(hi1[i], w[i][1], V::set(s.key0[round]));
      w[i][1] = lo1[i];
      w[i][2] = round == 2 ? V::bit_xor(hi0[i], V::set(s.round3))
                           : V::xor3(hi0[i], w[i][3], V::set(s.key1[round]));
      w[i][3] = lo0[i];
    }
  }
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
  V::select_bit30(word, sin, cos, x, y);
}

// 128 normals. Its own function: one copy serves all ops and dtypes, and has all registers.
__attribute__((noinline)) void normals(F (&z)[kVectors], uint32_t group, const Source& s) {
  for (int lane = 0; lane < kRow; ++lane) {
    U w[2][4];
    const uint32_t first = 32 * group + lane * W;
    philox<2>(w, {first, first + 16}, s);
    for (int pair = 0; pair < 4; ++pair) {
      F x, y;
      const U* words = w[pair / 2] + pair % 2 * 2;
      const F r = radius(words[0]);
      direction(words[1], x, y);
      z[2 * pair * kRow + lane] = V::mul(r, x);
      z[(2 * pair + 1) * kRow + lane] = V::mul(r, y);
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
