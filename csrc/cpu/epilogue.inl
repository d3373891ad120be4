// SPDX-License-Identifier: Apache-2.0
// From sums to outputs: scales, bias, activation, residual, in the order that zo_kernels/ops/qlinear.py gives;
// every line one correctly rounded operation.

#include "cpu/activation.inl"
#include "cpu/half.h"

namespace zo::cpu {
namespace {

constexpr int kMostGroups = 64;  // of a chunk
static_assert(kChunkIntegers / 8 <= kMostGroups);

inline size_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// What a block of columns needs, padded to whole vectors.
struct Columns {
  int64_t first;
  int count;
  const float* set_scale;
  bool has_zero = false;
  alignas(64) float bias[kColumns];
  alignas(64) float scale[kMostGroups * kColumns];  // [groups of the chunk][kColumns]
  alignas(64) int32_t zero[kMostGroups * kColumns];  // of the lanes

  Columns(const Product& p, int64_t panel, int panels, int64_t set)
      : first(panel * kPanel),
        count(static_cast<int>(std::min<int64_t>(panels * kPanel, p.n - first))),
        set_scale(p.scale + set * p.scale_stride) {
    std::fill_n(bias, kColumns, 0.0f);
    if (p.bias != nullptr) std::copy_n(p.bias + first, count, bias);
  }
  void aim(const Product& p, const Chunk& c, bool integers) {
    const float unit = p.perturb == Perturb::codes && p.bits == 4 && integers ? 0.0625f : 1.0f;
    has_zero = p.zero_point != nullptr && integers;
    const int32_t lane_zero = p.bits == 4 ? D::Narrow::kOffset : D::Wide::kOffset;
    for (int64_t g = 0; g < c.groups; ++g) {
      for (int j = 0; j < kColumns; ++j) {
        const int64_t at = (first + j) * p.groups + c.group + g;
        scale[g * kColumns + j] = j < count ? set_scale[at] * unit : 0.0f;
        if (has_zero) zero[g * kColumns + j] = lane_zero + (j < count ? p.zero_point[at] : 0);
      }
    }
  }
  const int32_t* zero_of(int64_t group) const { return has_zero ? zero + group * kColumns : nullptr; }
  // Lines of the output come while the tile is multiplied.
  void fetch(const Product& p, int64_t tile) const {
    const int64_t size = static_cast<int64_t>(size_of(p.out_dtype)), row = row_of(p, tile);
    for (int i = 0; i < rows_of(p, tile); ++i) {
      const char* out = static_cast<const char*>(p.out) + ((row + i) * p.n + first) * size;
      for (int64_t at = 0; at < count * size; at += 64) __builtin_prefetch(out + at, 1);
    }
  }
};

inline F load_as(const void* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::bf16: return V::load_bf16(static_cast<const uint16_t*>(p) + i);
    case Dtype::f16: return V::load_f16(static_cast<const uint16_t*>(p) + i);
    default: return V::load(static_cast<const float*>(p) + i);
  }
}
inline void store_as(void* p, Dtype dtype, int64_t i, F x) {
  switch (dtype) {
    case Dtype::bf16: return V::store_u16(static_cast<uint16_t*>(p) + i, V::bf16_bits(x));
    case Dtype::f16: return V::store_f16(static_cast<uint16_t*>(p) + i, x);
    default: return V::store(static_cast<float*>(p) + i, x);
  }
}

// The last vectors of a row, which reach past the columns, go by way of a buffer.
inline F load_some(const void* p, Dtype dtype, int64_t i, int count) {
  if (count >= W) return load_as(p, dtype, i);
  alignas(64) float padded[W] = {};
  std::memcpy(padded, static_cast<const char*>(p) + i * size_of(dtype), count * size_of(dtype));
  return load_as(padded, dtype, 0);
}
inline void store_some(void* p, Dtype dtype, int64_t i, int count, F x) {
  if (count >= W) return store_as(p, dtype, i, x);
  alignas(64) float padded[W];
  store_as(padded, dtype, 0, x);
  std::memcpy(static_cast<char*>(p) + i * size_of(dtype), padded, count * size_of(dtype));
}

// One group's total, scaled, is added to the sum over groups.
template <bool kIntegers>
void fold(const Product& p, const Columns& columns, int64_t group, int64_t part, int64_t set, const int32_t* total,
          const int32_t* signed_total, float* sum) {
  for (int at = 0; at < kTileSize; at += W) {
    F y;
    if constexpr (kIntegers) {
      y = V::from_i32(V::load_words(total + at));
      if (signed_total != nullptr) {
        y = V::add(y, V::mul(V::set(p.coeffs[set]), V::from_i32(V::load_words(signed_total + at))));
      }
    } else {
      y = V::load(reinterpret_cast<const float*>(total) + at);
    }
    y = V::mul(y, V::load(columns.scale + part * kColumns + at % kColumns));
    V::store(sum + at, group + part == 0 ? y : V::add(V::load(sum + at), y));
  }
}

// The sums over all groups become outputs.
inline void finish(const Product& p, const Columns& columns, int64_t tile, const float* sum) {
  const int64_t row = row_of(p, tile);
  for (int i = 0; i < rows_of(p, tile); ++i) {
    for (int j = 0; j < columns.count; j += W) {
      F y = V::load(sum + i * kColumns + j);
      if (p.row_scale != nullptr) y = V::mul(y, V::set(p.row_scale[tile * kTile + i]));
      if (p.bias != nullptr) y = V::add(y, V::load(columns.bias + j));
      if (p.activation != Activation::none) y = activate(p.activation, y);
      const int64_t place = (row + i) * p.n + columns.first + j;
      const int left = columns.count - j;
      if (p.residual != nullptr) y = V::add(y, load_some(p.residual, p.residual_dtype, place, left));
      store_some(p.out, p.out_dtype, place, left, y);
    }
  }
}

// The common case, without those questions: integers, one group, fp32, whole vectors.
inline bool plain(const Product& p) {
  return p.row_scale != nullptr && p.perturb != Perturb::weight && p.groups == 1 && p.n % W == 0 &&
         p.activation == Activation::none && p.out_dtype == Dtype::f32 &&
         (p.residual == nullptr || p.residual_dtype == Dtype::f32);
}

template <bool kBias, bool kResidual>
void finish_plain(const Product& p, const Columns& columns, int64_t tile, const int32_t* total) {
  const int64_t row = row_of(p, tile);
  for (int i = 0; i < rows_of(p, tile); ++i) {
    const F row_scale = V::set(p.row_scale[tile * kTile + i]);
    const int64_t place = (row + i) * p.n + columns.first;
    float* out = static_cast<float*>(p.out) + place;
    for (int j = 0; j < columns.count; j += W) {
      F y = V::mul(V::from_i32(V::load_words(total + i * kColumns + j)), V::load(columns.scale + j));
      y = V::mul(y, row_scale);
      if constexpr (kBias) y = V::add(y, V::load(columns.bias + j));
      if constexpr (kResidual) y = V::add(y, V::load(static_cast<const float*>(p.residual) + place + j));
      V::store(out + j, y);
    }
  }
}

inline void finish_plain(const Product& p, const Columns& columns, int64_t tile, const int32_t* total) {
  const bool bias = p.bias != nullptr, residual = p.residual != nullptr;
  (bias ? (residual ? finish_plain<true, true> : finish_plain<true, false>)
        : (residual ? finish_plain<false, true> : finish_plain<false, false>))(p, columns, tile, total);
}

}  // namespace
}  // namespace zo::cpu
