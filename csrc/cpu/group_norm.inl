// SPDX-License-Identifier: Apache-2.0
// GroupNorm for one instruction set; see group_norm.h. Every line one correctly rounded operation.

#include "cpu/group_norm.h"
#include "cpu/quantize.inl"

namespace zo::cpu {
namespace {

template <class Run>
auto with_pixels(const Norm& n, const Run& run) {
  Quantize q{};
  q.x = n.x;
  q.dtype = n.dtype;
  return with_pointer(q, run);
}

void moments_here(const Norm& n, int64_t begin, int64_t end, float* sums) {
  std::fill_n(sums, 2 * n.channels, 0.0f);
  with_pixels(n, [&](auto x) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      each_vector(advance(x, pixel * n.channels), nullptr, 0, n.channels, [&](F v, int64_t c, int count) {
        F pivot = V::set(0.0f);
        each_vector(x, nullptr, c, c + count, [&](F first, int64_t, int) { pivot = first; });
        const F d = V::sub(v, pivot);
        float* square = sums + n.channels + c;
        store_some(sums + c, Dtype::f32, 0, count, V::add(load_some(sums + c, Dtype::f32, 0, count), d));
        store_some(square, Dtype::f32, 0, count, V::add(load_some(square, Dtype::f32, 0, count), V::mul(d, d)));
      });
    }
  });
}

// Calls each(y, place, count): W values of y, the first of which is at `place`.
template <class Each>
void each_normalized(const Norm& n, int64_t begin, int64_t end, const Each& each) {
  with_pixels(n, [&](auto x) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      each_vector(advance(x, pixel * n.channels), nullptr, 0, n.channels, [&](F v, int64_t c, int count) {
        F y = V::mul(V::add(v, V::load(n.before + c)), V::load(n.by + c));
        y = V::add(y, V::load(n.after + c));
        if (n.activation != Activation::none) y = activate(n.activation, y);
        each(y, pixel * n.channels + c, count);
      });
    }
  });
}

void normalize_here(const Norm& n, int64_t begin, int64_t end, void* out, Dtype out_dtype) {
  each_normalized(n, begin, end, [&](F y, int64_t i, int count) { store_some(out, out_dtype, i, count, y); });
}

uint32_t largest_normalized_here(const Norm& n, int64_t begin, int64_t end) {
  U most = V::set(0u);
  each_normalized(n, begin, end, [&](F y, int64_t, int count) {
    U magnitude = V::bit_and(V::bits(y), V::set(0x7FFFFFFFu));
    if (count < W) {  // behind the last channel, y is not of x
      alignas(64) int32_t some[W] = {}, all[W];
      V::store_words(all, magnitude);
      std::copy_n(all, count, some);
      magnitude = V::load_words(some);
    }
    most = V::if_greater(magnitude, most, magnitude, most);
  });
  return largest_lane(most);
}

void quantize_normalized_here(const Norm& n, int64_t begin, int64_t end, uint32_t largest, int8_t* codes) {
  if (!has_scale(largest)) {
    std::memset(codes + begin * n.channels, 0, static_cast<size_t>((end - begin) * n.channels));
    return;
  }
  const F inverse = V::set(127.0f / float_of(largest));
  each_normalized(n, begin, end, [&](F y, int64_t i, int count) {
    store_codes(codes + i, count, D::nearest(V::mul(y, inverse)));
  });
}

}  // namespace
}  // namespace zo::cpu
