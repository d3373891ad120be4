// SPDX-License-Identifier: Apache-2.0
// group_norm, group_norm_quantize, layer_norm_quantize and geglu_quantize behind their schemas.
#include <algorithm>
#include <cmath>

#include "cpu/activations.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace zo::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kBlock = 64;  // pixels that are summed up in fp32

// The normalization of each sample, from the moments of x.
class Norms {
 public:
  Norms(const std::string& op, const Tensor& pixels, int64_t groups, const MaybeTensor& weight, const MaybeTensor& bias,
        double eps, const MaybeTensor& shift, const std::string& activation)
      : samples_(pixels.size(0)), pixels_(pixels.size(1) * pixels.size(2)), channels_(pixels.size(3)) {
    STD_TORCH_CHECK(groups >= 1 && channels_ % groups == 0, op, ": groups must divide the ", channels_,
                    " channels of x, got ", groups, "; copy it from the float layer");
    for (const MaybeTensor* t : {&weight, &bias}) {
      STD_TORCH_CHECK(!*t || (*t)->numel() == channels_, op, ": weight and bias must be [", channels_,
                      "], got others; check which layer x feeds");
    }
    STD_TORCH_CHECK(!shift || shift->numel() == samples_ * channels_, op, ": shift must be [", samples_, ", ", channels_,
                    "], got ", shift ? shift->numel() : 0, " values; check it");
    norm_.x = pixels.const_data_ptr();
    norm_.dtype = dtype_of(op, "x", pixels);
    norm_.channels = channels_;
    norm_.activation = activation_of(activation);
    size_ = static_cast<int64_t>(pixels.element_size());
    padded_ = (channels_ + kPanel - 1) / kPanel * kPanel;
    factors_.assign(static_cast<size_t>(3 * samples_ * padded_), 0.0f);
    const Tensor w = weight ? floats(*weight) : Tensor(), b = bias ? floats(*bias) : Tensor();
    const Tensor s = shift ? floats(*shift) : Tensor();
    measure(groups, eps, weight ? data(w) : nullptr, bias ? data(b) : nullptr, shift ? data(s) : nullptr);
  }

  Norm of(int64_t sample) const {
    Norm n = norm_;
    n.x = static_cast<const char*>(norm_.x) + sample * pixels_ * channels_ * size_;
    n.before = factors_.data() + 3 * sample * padded_;
    n.by = n.before + padded_;
    n.after = n.by + padded_;
    return n;
  }

  // run(sample, begin, end) over the pixels of all samples.
  template <class Run>
  void each_range(const Run& run) const {
    each_sample_range(samples_ * pixels_, pixels_, channels_, run);
  }

 private:
  static const float* data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

  void measure(int64_t groups, double eps, const float* weight, const float* bias, const float* shift) {
    const int64_t blocks = (pixels_ + kBlock - 1) / kBlock, size = channels_ / groups;
    std::vector<float> sums(static_cast<size_t>(samples_ * blocks * 2 * channels_));
    parallel_for(0, samples_ * blocks, std::max<int64_t>(1, kGrain / (kBlock * channels_)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % blocks * kBlock;
        kernels().moments(of(i / blocks), first, std::min(pixels_, first + kBlock), sums.data() + i * 2 * channels_);
      }
    });
    const double count = static_cast<double>(pixels_);
    parallel_for(0, samples_ * groups, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> means(static_cast<size_t>(size));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / groups, first = i % groups * size;
        double mean = 0, variance = 0;
        for (int64_t j = 0; j < size; ++j) {
          const int64_t c = first + j;
          double sum = 0, square = 0;
          for (int64_t b = 0; b < blocks; ++b) {
            const float* at = sums.data() + (sample * blocks + b) * 2 * channels_ + c;
            sum += at[0];
            square += at[channels_];
          }
          const double offset = sum / count;
          variance += (square / count - offset * offset) / static_cast<double>(size);
          means[j] = pivot(sample, c) + (shift != nullptr ? shift[sample * channels_ + c] : 0.0) + offset;
          mean += means[j] / static_cast<double>(size);
        }
        for (double m : means) variance += (m - mean) * (m - mean) / static_cast<double>(size);
        const double rate = 1.0 / std::sqrt(std::max(variance, 0.0) + eps);
        for (int64_t j = 0; j < size; ++j) {
          const int64_t c = first + j;
          float* at = factors_.data() + 3 * sample * padded_ + c;
          at[0] = static_cast<float>((shift != nullptr ? shift[sample * channels_ + c] : 0.0) - mean);
          at[padded_] = static_cast<float>(variance == variance ? rate * (weight != nullptr ? weight[c] : 1.0) : variance);
          at[2 * padded_] = bias != nullptr ? bias[c] : 0.0f;
        }
      }
    });
  }

  double pivot(int64_t sample, int64_t c) const {
    const char* at = static_cast<const char*>(norm_.x) + (sample * pixels_ * channels_ + c) * size_;
    if (norm_.dtype == Dtype::f32) return *reinterpret_cast<const float*>(at);
    const uint16_t half = *reinterpret_cast<const uint16_t*>(at);
    return norm_.dtype == Dtype::bf16 ? bf16_to_float(half) : f16_to_float(half);
  }

  int64_t samples_, pixels_, channels_, size_ = 0, padded_ = 0;
  Norm norm_{};
  std::vector<float> factors_;  // [samples][3][padded]
};

}  // namespace

Tensor group_norm(Tensor x, int64_t groups, MaybeTensor weight, MaybeTensor bias, double eps, MaybeTensor shift,
                  std::string activation) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "group_norm: x must be [B, C, H, W] on the CPU, got ", x.dim(),
                  " dimensions; call zo_kernels.ops.group_norm");
  const Tensor pixels = pixels_last(x);
  Tensor out = new_output(pixels, pixels.sizes(), pixels.scalar_type());
  if (out.numel() == 0) return channels_first(out);
  const Norms norms("group_norm", pixels, groups, weight, bias, eps, shift, activation);
  const Dtype dtype = dtype_of("group_norm", "x", out);
  const int64_t sample_bytes = out.numel() / out.size(0) * static_cast<int64_t>(out.element_size());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  norms.each_range([&](int64_t sample, int64_t begin, int64_t end) {
    kernels().normalize(norms.of(sample), begin, end, to + sample * sample_bytes, dtype);
  });
  return channels_first(out);
}

std::tuple<Tensor, Tensor> group_norm_quantize(Tensor x, int64_t groups, MaybeTensor weight, MaybeTensor bias, double eps,
                                               MaybeTensor shift, std::string activation) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "group_norm_quantize: x must be [B, C, H, W] on the CPU, got ", x.dim(),
                  " dimensions; call zo_kernels.ops.group_norm_quantize");
  const Tensor pixels = pixels_last(x);
  Tensor codes = new_output(pixels, pixels.sizes(), ScalarType::Char);
  Tensor scale = torch::stable::new_empty(pixels, {pixels.size(0)}, ScalarType::Float);
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  if (codes.numel() == 0) {
    std::fill_n(scales, scale.numel(), 0.0f);
    return {channels_first(codes), scale};
  }
  const Norms norms("group_norm_quantize", pixels, groups, weight, bias, eps, shift, activation);
  SampleMaxima most(x.size(0));
  norms.each_range([&](int64_t sample, int64_t begin, int64_t end) {
    most.raise(sample, kernels().largest_normalized(norms.of(sample), begin, end));
  });
  auto* to = static_cast<int8_t*>(codes.mutable_data_ptr());
  const int64_t size = codes.numel() / x.size(0);
  norms.each_range([&](int64_t sample, int64_t begin, int64_t end) {
    kernels().quantize_normalized(norms.of(sample), begin, end, most.of(sample), to + sample * size);
  });
  for (int64_t b = 0; b < x.size(0); ++b) scales[b] = scale_of(most.of(b));
  return {channels_first(codes), scale};
}

namespace {

// Codes [..., channels] and scales [...] of the rows of x.
std::tuple<Tensor, Tensor> quantize_each_row(const std::string& op, const Tensor& x, int64_t channels, Rows r,
                                             void (*run)(const Rows&, int64_t, int64_t)) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = channels;
  const std::vector<int64_t> lead(shape.begin(), shape.end() - 1);
  Tensor codes = new_output(x, shape, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, lead, ScalarType::Float);
  if (codes.numel() == 0) return {codes, scale};
  r.x = x.const_data_ptr();
  r.dtype = dtype_of(op, "x", x);
  r.channels = channels;
  r.stride = x.size(x.dim() - 1);
  r.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  r.scale = static_cast<float*>(scale.mutable_data_ptr());
  parallel_for(0, codes.numel() / channels, std::max<int64_t>(1, kGrain / channels),
               [&](int64_t begin, int64_t end) { run(r, begin, end); });
  return {codes, scale};
}

}  // namespace

std::tuple<Tensor, Tensor> layer_norm_quantize(Tensor x, MaybeTensor weight, MaybeTensor bias, double eps) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1 && x.size(x.dim() - 1) >= 1,
                  "layer_norm_quantize: x must be [..., K] on the CPU; call zo_kernels.ops.layer_norm_quantize");
  const int64_t channels = x.size(x.dim() - 1);
  for (const MaybeTensor* t : {&weight, &bias}) {
    STD_TORCH_CHECK(!*t || (*t)->numel() == channels, "layer_norm_quantize: weight and bias must be [", channels,
                    "], got others; check which layer x feeds");
  }
  const Tensor w = weight ? floats(*weight) : Tensor(), b = bias ? floats(*bias) : Tensor();
  Rows r{};
  r.weight = weight ? static_cast<const float*>(w.const_data_ptr()) : nullptr;
  r.bias = bias ? static_cast<const float*>(b.const_data_ptr()) : nullptr;
  r.eps = static_cast<float>(eps);
  return quantize_each_row("layer_norm_quantize", torch::stable::contiguous(x), channels, r, kernels().quantize_layer_norm);
}

std::tuple<Tensor, Tensor> geglu_quantize(Tensor x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1 && x.size(x.dim() - 1) >= 2 && x.size(x.dim() - 1) % 2 == 0,
                  "geglu_quantize: x must be [..., 2 K] on the CPU; call zo_kernels.ops.geglu_quantize");
  return quantize_each_row("geglu_quantize", torch::stable::contiguous(x), x.size(x.dim() - 1) / 2, Rows{},
                           kernels().quantize_geglu);
}

}  // namespace zo::cpu
