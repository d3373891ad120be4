// SPDX-License-Identifier: Apache-2.0
// The one skeleton of the update ops for one instruction set, behind the `V` of noise.inl: the noise of a
// group of 128 elements is accumulated in registers, then an op's struct does its arithmetic. An op has
//   F start(F p, snap): what the terms are added to, one after another;
//   F finish(F total, F p, float* const state[2], int64_t at, snap): the new p; the state of W elements lies
//     at state[k] + at;
//   kSnapsTerms: whether the terms are put on the grid.
// They repeat zo_kernels/_arithmetic.py line by line.

#include <cstring>

#include "cpu/noise.inl"
#include "cpu/update.h"
#include "cpu/half.h"

namespace zo::cpu {
namespace {

struct F32 {
  using T = float;
  static F load(const T* p) { return V::load(p); }
  static void store(T* p, F x) { V::store(p, x); }
};
struct Bf16 {
  using T = uint16_t;
  static constexpr uint32_t kLargest = 0x7F7F0000;
  static F load(const T* p) { return V::load_bf16(p); }
  static void store(T* p, F x) { V::store_u16(p, V::bf16_bits(x)); }
  static U nearest(F x) { return V::bf16_bits(x); }
  static U random(U bits, U, U r) { return V::template shift_right<16>(V::add(bits, r)); }
};
struct F16 {
  using T = uint16_t;
  static constexpr uint32_t kLargest = 0x477FE000, kSmallestNormal = 0x38800000;
  static F load(const T* p) { return V::load_f16(p); }
  static void store(T* p, F x) { V::store_f16(p, x); }
  static U nearest(F x) { return V::f16_bits(x); }
  static U random(U bits, U magnitude, U r) {
    const U small = V::if_greater(V::set(kSmallestNormal), magnitude, magnitude, V::set(0u));
    const U units = V::truncated(V::mul(V::floats(small), V::set(0x1p40f)));  // of 2^-40
    const U subnormal = V::template shift_right<16>(V::add(units, r));
    const U lifted = V::add(magnitude, V::template shift_right<3>(r));
    const U normal = V::template shift_right<13>(V::sub(lifted, V::set(112u << 23)));
    const U sign = V::bit_and(V::template shift_right<16>(bits), V::set(0x8000u));
    return V::bit_or(V::if_greater(V::set(kSmallestNormal), magnitude, subnormal, normal), sign);
  }
};

// Rounded by the 16-bit integers r; beyond the finite range to the nearest.
template <class D>
inline void store_randomly(uint16_t* p, F x, U r) {
  const U bits = V::bits(x), magnitude = V::bit_and(bits, V::set(0x7FFFFFFFu));
  const U random = D::random(bits, magnitude, r);
  V::store_u16(p, V::if_greater(magnitude, V::set(uint32_t{D::kLargest}), D::nearest(x), random));
}

struct Anywhere {  // no grid
  F operator()(F x) const { return x; }
};
struct Grid {  // the nearest multiple of a power of two, ties to even
  F middle;
  explicit Grid(float quantum) : middle(V::set(0x1.8p23f * quantum)) {}
  F operator()(F x) const { return V::sub(V::add(x, middle), middle); }
};

// total[v] + factor * z, term by term; equal draws next to each other share one z.
template <class Snap>
inline void add_normals(F (&total)[kVectors], uint32_t group, uint32_t stream, const Call& c, Source& s,
                        Snap snap) {
  for (int64_t j = 0; j < c.count;) {
    F z[kVectors];
    const int64_t draw = c.draws[j];
    s.aim(stream, static_cast<uint64_t>(draw));
    normals(z, group, s);
    do {
      const F factor = V::set(c.factors[j]);
      for (int v = 0; v < kVectors; ++v) total[v] = V::add(total[v], snap(V::mul(factor, z[v])));
    } while (++j < c.count && c.draws[j] == draw);
  }
}

template <class Snap>
inline void add_signs(F (&total)[kVectors], uint32_t group, uint32_t stream, const Call& c, Snap snap) {
  constexpr int kPerWord = 32 / W;
  for (int64_t j = 0; j < c.count;) {
    const int64_t draw = c.draws[j];
    const uint64_t word = static_cast<uint64_t>(draw);
    const Words words = philox4x32(
        {{group, stream, static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)}}, c.seed);
    do {
      const F factor = V::set(c.factors[j]);
      for (int v = 0; v < kVectors; ++v) {
        const uint32_t bits = words.w[v / kPerWord] >> (v % kPerWord * W);
        total[v] = V::add(total[v], snap(V::sign_by_bits(bits, factor)));
      }
    } while (++j < c.count && c.draws[j] == draw);
  }
}

// Elements 128 group .. of a parameter, all of which lie at p and state.
template <class D, class Rule, class Snap, bool kRandom>
inline void update_group(typename D::T* p, float* const (&state)[2], uint32_t group, const Piece& piece,
                         const Call& c, Source& s, const Rule& rule, Snap snap) {
  F total[kVectors];
  for (int v = 0; v < kVectors; ++v) total[v] = rule.start(D::load(p + v * W), snap);
  const auto add = [&](auto snap_term) {
    if (c.kind == Kind::normal) {
      add_normals(total, group, piece.stream, c, s, snap_term);
    } else {
      add_signs(total, group, piece.stream, c, snap_term);
    }
  };
  if constexpr (Rule::kSnapsTerms) {
    add(snap);
  } else {
    add(Anywhere{});
  }
  for (int v = 0; v < kVectors; ++v) total[v] = rule.finish(total[v], D::load(p + v * W), state, v * W, snap);
  if constexpr (kRandom) {
    U r[kVectors];
    s.aim(piece.stream, static_cast<uint64_t>(c.round_draw));
    round_bits(r, group, s);
    for (int v = 0; v < kVectors; ++v) store_randomly<D>(p + v * W, total[v], r[v]);
  } else {
    for (int v = 0; v < kVectors; ++v) D::store(p + v * W, total[v]);
  }
}

constexpr int64_t kAhead = 2048;  // bytes

template <class D, class Rule, bool kRandom, class Snap>
void each_group(const Piece& piece, const Call& c, Snap snap) {
  const Rule rule(c);
  Source source(c.seed);
  auto* p = static_cast<typename D::T*>(piece.p);
  uint32_t group = static_cast<uint32_t>(piece.first / kGroup);
  int64_t i = 0;
  const auto run = [&](typename D::T* at, float* const (&state)[2]) {
    update_group<D, Rule, Snap, kRandom>(at, state, group++, piece, c, source, rule, snap);
  };
  float* state[2] = {piece.state[0], piece.state[1]};
  for (; i + kGroup <= piece.n; i += kGroup) {
    // The kernel computes for longer than the hardware looks ahead, and stops at each page.
    const char* ahead = reinterpret_cast<const char*>(p + i) + kAhead;
    for (size_t line = 0; line < kGroup * sizeof(*p); line += 64) __builtin_prefetch(ahead + line, 1);
    run(p + i, state);
    for (float*& x : state) x += x != nullptr ? kGroup : 0;
  }
  if (i == piece.n) return;
  const size_t left = static_cast<size_t>(piece.n - i);  // the tail, padded in buffers
  typename D::T padded[kGroup] = {};
  float kept[2][kGroup] = {};
  float* const at[2] = {state[0] != nullptr ? kept[0] : nullptr, state[1] != nullptr ? kept[1] : nullptr};
  std::memcpy(padded, p + i, left * sizeof(*p));
  for (int k = 0; k < 2; ++k) {
    if (at[k] != nullptr) std::memcpy(at[k], state[k], left * sizeof(float));
  }
  run(padded, at);
  std::memcpy(p + i, padded, left * sizeof(*p));
  for (int k = 0; k < 2; ++k) {
    if (at[k] != nullptr) std::memcpy(state[k], at[k], left * sizeof(float));
  }
}

template <class Rule>
void dispatch_dtype(const Piece& piece, const Call& c) {
  switch (piece.dtype) {
    case Dtype::f32:
      if (piece.quantum != 0.0f) return each_group<F32, Rule, false>(piece, c, Grid(piece.quantum));
      return each_group<F32, Rule, false>(piece, c, Anywhere{});
    case Dtype::bf16:
      if (c.rounds) return each_group<Bf16, Rule, true>(piece, c, Anywhere{});
      return each_group<Bf16, Rule, false>(piece, c, Anywhere{});
    case Dtype::f16:
      if (c.rounds) return each_group<F16, Rule, true>(piece, c, Anywhere{});
      return each_group<F16, Rule, false>(piece, c, Anywhere{});
  }
}

}  // namespace
}  // namespace zo::cpu

#include "cpu/add_noise.inl"
#include "cpu/zo_adam.inl"
#include "cpu/zo_sgd.inl"

namespace zo::cpu {
namespace {

void dispatch(const Piece& piece, const Call& c) {
  switch (c.op) {
    case Op::add_noise: return dispatch_dtype<AddNoise>(piece, c);
    case Op::zo_sgd: return dispatch_dtype<ZoSgd>(piece, c);
    case Op::zo_adam: return dispatch_dtype<ZoAdam>(piece, c);
  }
}

}  // namespace
}  // namespace zo::cpu
