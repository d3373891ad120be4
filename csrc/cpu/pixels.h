// SPDX-License-Identifier: Apache-2.0
// The activations of a quantized layer, made ready for a product: integers with their scales and sums, or fp32.
#pragma once

#include <atomic>

#include "cpu/activations.h"
#include "cpu/arena.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace zo::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::parallel_for;

// Codes, scales and sums of `rows` rows, of which each `rows_per_scale` share a scale.
void quantize_all(const Quantize& q, int64_t rows, int64_t rows_per_scale, float* scales) {
  const int64_t grain = std::max<int64_t>(1, kGrain / q.channels);
  if (rows_per_scale == 1) {
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const uint32_t most = kernels().largest(q, row, row + 1);
        scales[row] = scale_of(most);
        kernels().quantize(q, row, row + 1, most);
      }
    });
    return;
  }
  SampleMaxima most(rows / rows_per_scale);
  each_sample_range(rows, rows_per_scale, q.channels, [&](int64_t sample, int64_t begin, int64_t end) {
    const int64_t first = sample * rows_per_scale;
    most.raise(sample, kernels().largest(q, first + begin, first + end));
  });
  each_sample_range(rows, rows_per_scale, q.channels, [&](int64_t sample, int64_t begin, int64_t end) {
    const int64_t first = sample * rows_per_scale;
    kernels().quantize(q, first + begin, first + end, most.of(sample));
  });
  for (int64_t sample = 0; sample < rows / rows_per_scale; ++sample) scales[sample] = scale_of(most.of(sample));
}

Quantize quantize_of(const std::string& op, const Tensor& x, int64_t channels, const MaybeTensor& in_scale) {
  Quantize q{};
  q.x = x.const_data_ptr();
  q.dtype = dtype_of(op, "x", x);
  q.channels = q.stride = channels;
  q.groups = 1;
  if (in_scale) {
    STD_TORCH_CHECK(in_scale->scalar_type() == ScalarType::Float && in_scale->is_contiguous() &&
                        in_scale->numel() == channels,
                    op, ": in_scale must be contiguous float32 [", channels, "], got another; call zo_kernels.ops.", op);
    q.in_scale = static_cast<const float*>(in_scale->const_data_ptr());
  }
  return q;
}

// The arguments that both ops share.
struct Layer {
  std::string op;
  Tensor qweight, scale;
  MaybeTensor zero_point, bias;
  int64_t bits, act_bits;
  MaybeTensor x_scale, in_scale;
  std::string activation;
  MaybeTensor residual;
  std::string perturb, kind;
  int64_t seed, stream;
  Numbers draws;
  MaybeTensor coeffs;
  int64_t headroom;
  MaybeDtype out_dtype;
};

// Activations as a product reads them, by pixel; a row of a linear layer is a pixel.
struct Pixels {
  const void* data;
  int64_t stride;       // elements
  const int32_t* sums;  // [pixels][groups of a pixel]
  const float* scale;   // one for `rows_per_scale` pixels
  bool has_minus_128;
};

Pixels integer_pixels(const Layer& l, const Tensor& x, int64_t pixels, int64_t channels, int64_t pixels_per_scale,
                      int64_t groups, Arena& memory) {
  const int64_t padded = (channels + 3) / 4 * 4;
  int32_t* sums = memory.take<int32_t>(pixels * groups);
  Pixels out{nullptr, padded, sums, nullptr, false};
  if (x.scalar_type() != ScalarType::Char) {
    Quantize q = quantize_of(l.op, x, channels, l.in_scale);
    q.codes = memory.take<int8_t>(pixels * padded);
    q.padded = padded;
    q.sums = sums;
    q.groups = groups;
    float* scale = memory.take<float>(pixels / pixels_per_scale);
    quantize_all(q, pixels, pixels_per_scale, scale);
    out.data = q.codes;
    out.scale = scale;
    return out;
  }
  const auto* from = static_cast<const int8_t*>(x.const_data_ptr());
  int8_t* copy = padded == channels ? nullptr : memory.take<int8_t>(pixels * padded);
  std::atomic<bool> has_minus_128{false};
  parallel_for(0, pixels, std::max<int64_t>(1, kGrain / channels), [&](int64_t begin, int64_t end) {
    const bool found = kernels().add_up(from + begin * channels, end - begin, channels, groups, sums + begin * groups);
    for (int64_t i = begin; i < end && copy != nullptr; ++i) {
      std::copy_n(from + i * channels, channels, copy + i * padded);
      std::fill_n(copy + i * padded + channels, padded - channels, int8_t{0});
    }
    if (found) has_minus_128 = true;
  });
  STD_TORCH_CHECK(l.x_scale && l.x_scale->scalar_type() == ScalarType::Float && l.x_scale->is_contiguous() &&
                      l.x_scale->numel() == pixels / pixels_per_scale,
                  l.op, ": x_scale must be contiguous float32 [", pixels / pixels_per_scale,
                  "], got another; give what quantize_rows returned");
  out.data = copy != nullptr ? copy : from;
  out.scale = static_cast<const float*>(l.x_scale->const_data_ptr());
  out.has_minus_128 = has_minus_128;
  return out;
}

Pixels float_pixels(const Layer& l, const Tensor& x, int64_t pixels, int64_t channels, Arena& memory) {
  Pixels out{x.const_data_ptr(), channels, nullptr, nullptr, false};
  const Quantize q = quantize_of(l.op, x, channels, l.in_scale);
  if (q.dtype == Dtype::f32 && q.in_scale == nullptr) return out;
  float* copy = memory.take<float>(pixels * channels);
  parallel_for(0, pixels, std::max<int64_t>(1, kGrain / channels),
               [&](int64_t begin, int64_t end) { kernels().widen(q, begin, end, copy); });
  out.data = copy;
  return out;
}

}  // namespace
}  // namespace zo::cpu
