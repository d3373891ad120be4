// SPDX-License-Identifier: Apache-2.0
// Dynamic int8 of activations for one instruction set; the arithmetic is that of zo_kernels/ops/quantize_rows.py.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/quantize.h"

namespace zo::cpu {
namespace {

inline F load_from(const float* p) { return V::load(p); }
struct Bf16Pointer {
  const uint16_t* p;
};
struct F16Pointer {
  const uint16_t* p;
};
inline F load_from(Bf16Pointer p) { return V::load_bf16(p.p); }
inline F load_from(F16Pointer p) { return V::load_f16(p.p); }
inline const float* advance(const float* p, int64_t n) { return p + n; }
inline Bf16Pointer advance(Bf16Pointer p, int64_t n) { return {p.p + n}; }
inline F16Pointer advance(F16Pointer p, int64_t n) { return {p.p + n}; }
inline const void* raw(const float* p) { return p; }
inline const void* raw(Bf16Pointer p) { return p.p; }
inline const void* raw(F16Pointer p) { return p.p; }

// Calls each(values, index, count) for W values at a time, times in_scale; zeros stand behind the last.
template <class P, class Each>
inline void each_vector(P x, const float* in_scale, int64_t begin, int64_t end, const Each& each) {
  constexpr size_t size = std::is_same_v<P, const float*> ? 4 : 2;
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    F v = load_from(advance(x, i));
    if (in_scale != nullptr) v = V::mul(v, V::load(in_scale + i));
    each(v, i, W);
  }
  if (i == end) return;
  alignas(64) char padded[4 * W] = {};
  std::memcpy(padded, raw(advance(x, i)), (end - i) * size);
  P at = x;
  if constexpr (size == 4) {
    at = reinterpret_cast<const float*>(padded);
  } else {
    at = {reinterpret_cast<const uint16_t*>(padded)};
  }
  F v = load_from(at);
  if (in_scale != nullptr) {
    alignas(64) float scale[W] = {};
    std::copy(in_scale + i, in_scale + end, scale);
    v = V::mul(v, V::load(scale));
  }
  each(v, i, static_cast<int>(end - i));
}

inline uint32_t largest_lane(U most) {
  alignas(64) int32_t lanes[W];
  V::store_words(lanes, most);
  return static_cast<uint32_t>(*std::max_element(lanes, lanes + W));
}

inline void store_codes(int8_t* to, int count, U codes) {
  if (count == W) return D::store_codes(to, codes);
  alignas(64) int8_t last[W];
  D::store_codes(last, codes);
  std::memcpy(to, last, static_cast<size_t>(count));
}

template <class P>
uint32_t largest_of(const Quantize& q, P x, int64_t begin, int64_t end) {
  U most = V::set(0u);
  for (int64_t row = begin; row < end; ++row) {
    each_vector(advance(x, row * q.stride), q.in_scale, 0, q.channels, [&](F v, int64_t, int) {
      const U magnitude = V::bit_and(V::bits(v), V::set(0x7FFFFFFFu));
      most = V::if_greater(magnitude, most, magnitude, most);
    });
  }
  return largest_lane(most);
}

template <class P>
void quantize_from(const Quantize& q, P x, int64_t begin, int64_t end, uint32_t largest) {
  if (!has_scale(largest)) {
    std::memset(q.codes + begin * q.padded, 0, (end - begin) * q.padded);
    if (q.sums != nullptr) std::memset(q.sums + begin * q.groups, 0, (end - begin) * q.groups * sizeof(int32_t));
    return;
  }
  const F inverse = V::set(127.0f / float_of(largest));
  for (int64_t row = begin; row < end; ++row) {
    int8_t* codes = q.codes + row * q.padded;
    const int64_t group = q.channels / q.groups;
    for (int64_t g = 0; g < q.groups; ++g) {
      U sum = V::set(0u);
      const auto each = [&](F v, int64_t i, int count) {
        const U code = D::nearest(V::mul(v, inverse));
        sum = V::add(sum, code);
        store_codes(codes + i, count, code);
      };
      each_vector(advance(x, row * q.stride), q.in_scale, g * group, (g + 1) * group, each);
      if (q.sums != nullptr) q.sums[row * q.groups + g] = D::total(sum);
    }
    std::memset(codes + q.channels, 0, static_cast<size_t>(q.padded - q.channels));
  }
}

template <class Run>
auto with_pointer(const Quantize& q, const Run& run) {
  switch (q.dtype) {
    case Dtype::bf16: return run(Bf16Pointer{static_cast<const uint16_t*>(q.x)});
    case Dtype::f16: return run(F16Pointer{static_cast<const uint16_t*>(q.x)});
    default: return run(static_cast<const float*>(q.x));
  }
}

uint32_t largest_here(const Quantize& q, int64_t begin, int64_t end) {
  return with_pointer(q, [&](auto x) { return largest_of(q, x, begin, end); });
}

void widen_here(const Quantize& q, int64_t begin, int64_t end, float* out) {
  with_pointer(q, [&](auto x) {
    for (int64_t row = begin; row < end; ++row) {
      each_vector(advance(x, row * q.stride), q.in_scale, 0, q.channels, [&](F v, int64_t i, int count) {
        store_some(out, Dtype::f32, row * q.channels + i, count, v);
      });
    }
  });
}

bool add_up_here(const int8_t* codes, int64_t rows, int64_t channels, int64_t groups, int32_t* sums) {
  constexpr int kBytes = 4 * W;
  const typename D::Narrow ones = [] {
    alignas(64) uint8_t bytes[kBytes];
    std::fill_n(bytes, kBytes, uint8_t{1});
    return D::Narrow::load(bytes);
  }();
  const U low = V::set(0x01010101u), high = V::set(0x80808080u);
  U found = V::set(0u);
  const int64_t size = channels / groups;
  for (int64_t i = 0; i < rows * groups; ++i) {
    U sum = V::set(0u);
    const auto add = [&](U x) {
      sum = D::Narrow::dot(sum, ones, x);
      // The high bit of a byte that is 0 once its sign is turned; of those above it too, maybe.
      const U turned = V::bit_xor(x, high);
      found = V::bit_or(found, V::bit_and(V::sub(turned, low), V::bit_and(V::bit_xor(turned, high), high)));
    };
    const int8_t* row = codes + i * size;
    int64_t c = 0;
    for (; c + kBytes <= size; c += kBytes) add(V::load_words(reinterpret_cast<const int32_t*>(row + c)));
    if (c < size) {
      alignas(64) int8_t last[kBytes] = {};
      std::memcpy(last, row + c, static_cast<size_t>(size - c));
      add(V::load_words(reinterpret_cast<const int32_t*>(last)));
    }
    sums[i] = D::total(sum);
  }
  return largest_lane(V::bit_and(V::template shift_right<1>(found), V::set(0x7FFFFFFFu))) != 0;
}

void quantize_here(const Quantize& q, int64_t begin, int64_t end, uint32_t largest) {
  with_pointer(q, [&](auto x) { quantize_from(q, x, begin, end, largest); });
}

}  // namespace
}  // namespace zo::cpu
