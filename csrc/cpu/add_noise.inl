// SPDX-License-Identifier: Apache-2.0
// Body of add_noise for one instruction set. Include it behind a struct `V` of W = 1, 8 or 16 lanes:
//
//   V::F, V::U            vectors of W floats / 32-bit words
//   lane_blocks()         word l = (l % 4) * (W / 4) + l / 4 (0 for W = 1): see store order below
//   mulhilo, transpose    as used here; the rest is one instruction each
//
// A group is W Philox blocks side by side, one a lane. Its 4 W normals come as four vectors n0..n3, n_j[l]
// being element j of block l; transposing 4x4 within 128-bit lanes gives vectors of whole blocks, and
// the block order that lane_blocks() picks makes vector r hold elements [r W, (r + 1) W) of the group.
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

// sqrt(-2 log((word | 1) / 2^32))
inline F radius(U word) {
  const U bits = V::bits(V::from_u32(V::bit_or(word, V::set(1u))));
  const U exponent = V::shift_right_signed<23>(V::sub(bits, V::set(uint32_t{BoxMuller::kSqrtHalfBits})));
  const F t = V::add(V::floats(V::sub(bits, V::template shift_left<23>(exponent))), V::set(-1.0f));
  const F square = V::mul(t, t);
  const F tail = V::mul(V::mul(square, t), horner(t, BoxMuller::kLog));
  const F log_m = V::add(t, V::add(V::mul(square, V::set(-0.5f)), tail));
  const F whole = V::from_i32(V::sub(exponent, V::set(32u)));
  const F log_u = V::add(log_m, V::mul(whole, V::set(BoxMuller::kLn2)));
  return V::sqrt(V::mul(log_u, V::set(-2.0f)));
}

// sin and cos of 2 pi word / 2^32
inline void sin_cos(U word, F& sin, F& cos) {
  const U shifted = V::add(word, V::set(1u << 29));
  const U quarter = V::template shift_right<30>(shifted);
  const U rest = V::sub(V::bit_and(shifted, V::set(0x3FFFFFFFu)), V::set(1u << 29));
  const F x = V::mul(V::from_i32(rest), V::set(BoxMuller::kAngle));
  const F square = V::mul(x, x);
  const F s = V::add(x, V::mul(V::mul(x, square), horner(square, BoxMuller::kSin)));
  const F c = V::add(V::add(V::mul(square, V::set(-0.5f)), V::set(1.0f)),
                     V::mul(V::mul(square, square), horner(square, BoxMuller::kCos)));
  const U odd = V::template shift_left<31>(quarter);  // sign bit set in quarters 1 and 3
  const U sign_sin = V::template shift_left<31>(V::template shift_right<1>(quarter));
  const U sign_cos = V::bit_xor(sign_sin, odd);  // quarters 1 and 2
  sin = V::floats(V::bit_xor(V::bits(V::select_sign(odd, c, s)), sign_sin));
  cos = V::floats(V::bit_xor(V::bits(V::select_sign(odd, s, c)), sign_cos));
}

// acc: 4 W elements of the group that starts at block `first`.
inline void add_normal(F (&acc)[4], uint32_t first, uint64_t draw, F scale, const NoiseTerms& t) {
  const Block4 b = philox(V::add(V::set(first), V::lane_blocks()), t.stream, draw, t.seed);
  F n[4], sin, cos;
  for (int pair = 0; pair < 2; ++pair) {
    const F r = radius(b.w[2 * pair]);
    sin_cos(b.w[2 * pair + 1], sin, cos);
    n[2 * pair] = V::mul(r, cos);
    n[2 * pair + 1] = V::mul(r, sin);
  }
  V::transpose(n);
  for (int r = 0; r < 4; ++r) acc[r] = V::add(acc[r], V::mul(n[r], scale));
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

// One group of 4 W elements at p; `block` is its first Philox block.
template <class D>
inline void normal_group(typename D::T* p, uint32_t block, const NoiseTerms& t) {
  F acc[4];
  for (int r = 0; r < 4; ++r) acc[r] = V::mul(D::load(p + r * W), V::set(t.decay));
  for (int64_t j = 0; j < t.count; ++j) {
    add_normal(acc, block, static_cast<uint64_t>(t.draws[j]), V::set(t.scales[j]), t);
  }
  for (int r = 0; r < 4; ++r) D::store(p + r * W, acc[r]);
}

template <class D>
void add_normals(typename D::T* p, int64_t first, int64_t n, const NoiseTerms& t) {
  constexpr int64_t kGroup = 4 * W;
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    normal_group<D>(p + i, static_cast<uint32_t>((first + i) / 4), t);
  }
  if (i < n) {  // the tail, padded in a buffer
    typename D::T padded[kGroup] = {};
    std::memcpy(padded, p + i, (n - i) * sizeof(*p));
    normal_group<D>(padded, static_cast<uint32_t>((first + i) / 4), t);
    std::memcpy(p + i, padded, (n - i) * sizeof(*p));
  }
}

// One block of 128 elements at p.
template <class D>
inline void rademacher_block(typename D::T* p, uint32_t block, const NoiseTerms& t) {
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

template <class D>
void add_signs(typename D::T* p, int64_t first, int64_t n, const NoiseTerms& t) {
  int64_t i = 0;
  for (; i + 128 <= n; i += 128) {
    rademacher_block<D>(p + i, static_cast<uint32_t>((first + i) / 128), t);
  }
  if (i < n) {
    typename D::T padded[128] = {};
    std::memcpy(padded, p + i, (n - i) * sizeof(*p));
    rademacher_block<D>(padded, static_cast<uint32_t>((first + i) / 128), t);
    std::memcpy(p + i, padded, (n - i) * sizeof(*p));
  }
}

template <class D>
void run(void* p, int64_t first, int64_t n, const NoiseTerms& terms) {
  auto* typed = static_cast<typename D::T*>(p);
  if (terms.kind == Kind::normal) {
    add_normals<D>(typed, first, n, terms);
  } else {
    add_signs<D>(typed, first, n, terms);
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
