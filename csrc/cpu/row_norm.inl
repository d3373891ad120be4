// SPDX-License-Identifier: Apache-2.0
// LayerNorm and GEGLU, quantized, for one instruction set; see row_norm.h. The floats of a row stay in L1. Every line
// one correctly rounded operation.

#include <vector>

#include "cpu/row_norm.h"

namespace zo::cpu {
namespace {

constexpr int kParts = 16;  // sums of a row, on every instruction set

// The row as fp32, zeros behind it.
inline void load_row(const Rows& r, int64_t row, int64_t first, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += W) {
    const int some = static_cast<int>(std::min<int64_t>(W, count - i));
    V::store(to + i, load_some(r.x, r.dtype, row * r.stride + first + i, some));
  }
}

// Sum of each(v), in doubles over the parts.
template <class Each>
inline double sum_of(const float* y, int64_t count, const Each& each) {
  alignas(64) float parts[kParts] = {};
  const int64_t whole = count / kParts * kParts;
  for (int p = 0; p < kParts; p += W) {
    F sum = V::set(0.0f);
    for (int64_t i = p; i < whole; i += kParts) sum = V::add(sum, each(V::load(y + i)));
    V::store(parts + p, sum);
  }
  alignas(64) float last[kParts];
  for (int64_t i = whole; i < count; i += W) V::store(last + (i - whole), each(V::load(y + i)));
  double total = 0;
  for (float part : parts) total += part;
  for (int64_t i = whole; i < count; ++i) total += last[i - whole];
  return total;
}

inline void quantize_row(const Rows& r, int64_t row, const float* y) {
  Quantize q{};
  q.x = y;
  q.dtype = Dtype::f32;
  q.channels = q.padded = r.channels;
  q.groups = 1;
  q.codes = r.codes + row * r.channels;
  const uint32_t largest = largest_here(q, 0, 1);
  r.scale[row] = scale_of(largest);
  quantize_here(q, 0, 1, largest);
}

void quantize_layer_norm_here(const Rows& r, int64_t begin, int64_t end) {
  std::vector<float> room(static_cast<size_t>(r.channels + kParts));
  float* y = room.data();
  for (int64_t row = begin; row < end; ++row) {
    load_row(r, row, 0, r.channels, y);
    const double count = static_cast<double>(r.channels);
    const float mean = static_cast<float>(sum_of(y, r.channels, [](F v) { return v; }) / count);
    const F shift = V::set(mean);
    const double square = sum_of(y, r.channels, [&](F v) {
      const F d = V::sub(v, shift);
      return V::mul(d, d);
    });
    const F rate = V::set(static_cast<float>(1.0 / std::sqrt(square / count + static_cast<double>(r.eps))));
    for (int64_t i = 0; i < r.channels; i += W) {
      const int some = static_cast<int>(std::min<int64_t>(W, r.channels - i));
      F v = V::mul(V::sub(V::load(y + i), shift), rate);
      if (r.weight != nullptr) v = V::mul(v, load_some(r.weight, Dtype::f32, i, some));
      if (r.bias != nullptr) v = V::add(v, load_some(r.bias, Dtype::f32, i, some));
      V::store(y + i, v);
    }
    quantize_row(r, row, y);
  }
}

void quantize_geglu_here(const Rows& r, int64_t begin, int64_t end) {
  std::vector<float> room(static_cast<size_t>(r.channels + kParts));
  float* y = room.data();
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t i = 0; i < r.channels; i += W) {
      const int some = static_cast<int>(std::min<int64_t>(W, r.channels - i));
      const int64_t at = row * r.stride + i;
      V::store(y + i, V::mul(load_some(r.x, r.dtype, at, some), gelu(load_some(r.x, r.dtype, at + r.channels, some))));
    }
    quantize_row(r, row, y);
  }
}

}  // namespace
}  // namespace zo::cpu
