// SPDX-License-Identifier: Apache-2.0
// quantize_rows, qlinear and qconv2d behind their schemas: tensors become raw pointers and tables, the work is cut
// into ranges for torch's threads. What would read or write out of bounds is checked here, the rest in Python.
#include <algorithm>
#include <limits>

#include "cpu/pixels.h"
#include "cpu/plan.h"
#include "cpu/share_out.h"

namespace zo::cpu {
namespace {

// The scales of each set, perturbed: [sets][n * groups].
const float* perturbed_scales(const Layer& l, const float* scale, int64_t count, const float* coeffs, Arena& memory) {
  const bool relative = l.perturb == "scale_relative";
  const int64_t sets = static_cast<int64_t>(l.draws.size());
  float* out = memory.take<float>(sets * count);
  const float one = 1.0f;
  parallel_for(0, sets, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      float* at = out + s * count;
      if (relative) {
        std::fill_n(at, count, 1.0f);
      } else {
        std::copy_n(scale, count, at);
      }
      Call call{};
      call.op = Op::add_noise;
      call.seed = static_cast<uint64_t>(l.seed);
      call.kind = l.kind == "normal" ? Kind::normal : Kind::rademacher;
      call.count = 1;
      call.draws = &l.draws[static_cast<size_t>(s)];
      call.factors = coeffs + s;
      call.hyper = &one;
      update({at, Dtype::f32, static_cast<uint32_t>(l.stream), 0.0f, 0, count, {}}, call);
      if (!relative) continue;
      for (int64_t i = 0; i < count; ++i) at[i] = scale[i] * at[i];
    }
  });
  return out;
}

// Offsets, sums and scales of the rows, tile by tile.
void fill_tables(Product& p, const Geometry& g, const Pixels& a, bool per_sample, Arena& memory) {
  const int64_t tiles = p.sets * p.tiles, tap_groups = p.groups == 1 ? 1 : p.groups / p.taps;
  auto* offset = memory.take<int32_t>(tiles * p.taps * kTile);
  auto* sums = a.sums != nullptr ? memory.take<int32_t>(tiles * p.groups * kTile) : nullptr;
  auto* scale = a.scale != nullptr ? memory.take<float>(tiles * kTile) : nullptr;
  parallel_for(0, tiles, std::max<int64_t>(1, 1024 / (p.taps + p.groups)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = row_of(p, t);
      Position at(g, first);
      for (int64_t i = 0; i < rows_of(p, t); ++i, at.next(g)) {
        if (scale != nullptr) scale[t * kTile + i] = a.scale[per_sample ? at.sample : first + i];
        if (sums != nullptr && p.groups == 1) sums[t * kTile + i] = 0;
        for (int64_t tap = 0; tap < p.taps; ++tap) {
          const int64_t pixel = at.seen_through(g, tap);
          offset[(t * p.taps + tap) * kTile + i] = pixel < 0 ? kOutside : static_cast<int32_t>(pixel * a.stride);
          if (sums == nullptr) continue;
          if (p.groups == 1) {
            sums[t * kTile + i] += pixel < 0 ? 0 : a.sums[pixel];
            continue;
          }
          for (int64_t k = 0; k < tap_groups; ++k) {
            sums[(t * p.groups + tap * tap_groups + k) * kTile + i] = pixel < 0 ? 0 : a.sums[pixel * tap_groups + k];
          }
        }
      }
    }
  });
  p.offset = offset;
  p.sums = sums;
  p.row_scale = scale;
}

int64_t panels_of(const Product& p) { return (p.n + kPanel - 1) / kPanel; }

// Many rows are shared out by tiles, each range reading all weights; few by panels, each weight being read once.
void run(const Product& p) {
  const int64_t tiles = p.sets * p.tiles, panels = panels_of(p), threads = torch::stable::get_num_threads();
  const Kernels& k = kernels_for(p);
  const auto some_panels = [&](int64_t begin, int64_t end) { k.multiply(p, begin, end, 0, tiles); };
  const bool large = 2 * p.n * p.rows * p.sets * p.taps * p.channels >= 1 << 18;  // worth a second thread
  if (tiles >= 32 * threads) {
    share_out(tiles, kBlockTiles / 4, [&](int64_t begin, int64_t end) { k.multiply(p, 0, panels, begin, end); });
  } else if (panels >= 4 * kBlockPanels * threads) {
    share_out(panels, kBlockPanels, some_panels);
  } else {  // too few to be shared out in whole blocks
    parallel_for(0, panels, large ? 1 : panels, some_panels);
  }
}

// `x` and `residual`: pixel by pixel, contiguous. Returns [rows, N] in the memory order of the pixels.
Tensor multiply_layer(const Layer& l, const Tensor& x, const MaybeTensor& residual, const Geometry& g,
                      int64_t channels, bool per_sample, std::vector<int64_t> out_shape) {
  Arena& memory = arena();
  const int64_t pixels = g.samples * g.height * g.width;
  const bool integers = l.act_bits == 8 || x.scalar_type() == ScalarType::Char;
  Product p{};
  p.taps = g.taps();
  p.channels = channels;
  p.bits = static_cast<int>(l.bits);
  p.n = l.scale.size(0);
  p.groups = l.scale.dim() == 1 ? 1 : l.scale.size(1);
  p.sets = std::max<int64_t>(1, static_cast<int64_t>(l.draws.size()));
  p.rows = g.rows() / p.sets;
  p.tiles = (p.rows + kTile - 1) / kTile;

  // The output.
  const ScalarType result = l.out_dtype.value_or(x.scalar_type() == ScalarType::Char ? ScalarType::Float : x.scalar_type());
  Tensor out = new_output(l.scale, out_shape, result);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  p.out_dtype = dtype_of(l.op, "out_dtype", out);

  // The weight.
  const int64_t run_length = p.taps * channels / p.groups, step = 32 / l.bits;
  STD_TORCH_CHECK(l.bits == 8 || l.bits == 4, l.op, ": bits must be 8 or 4, got ", l.bits, "; choose one");
  STD_TORCH_CHECK(p.groups == 1 || (run_length % 8 == 0 && channels % run_length == 0), l.op,
                  ": groups of scales must be of a multiple of 8 that divides the ", channels, " channels, got ",
                  run_length, "; call torch.ops.zo_kernels.", l.op, ".reference");
  const Tensor qweight = torch::stable::contiguous(l.qweight);
  STD_TORCH_CHECK(qweight.is_cpu() && qweight.scalar_type() == ScalarType::Byte && qweight.numel() == panels_of(p) * p.taps * ((channels + step - 1) / step) * 4 * kPanel,
                  l.op, ": qweight must be uint8 on the CPU, packed for ", p.n, " rows of ", p.taps, " * ", channels,
                  " codes, got ", qweight.numel(), " bytes; give what zo_kernels.packing.pack returns");
  p.weight = static_cast<const uint8_t*>(qweight.const_data_ptr());
  STD_TORCH_CHECK(l.scale.is_cpu() && l.scale.scalar_type() == ScalarType::Float, l.op,
                  ": scale must be float32 on the CPU, got another; call zo_kernels.ops.", l.op);
  const Tensor scale = torch::stable::contiguous(l.scale);
  p.scale = static_cast<const float*>(scale.const_data_ptr());
  Tensor zero_point, bias;
  if (l.zero_point) {
    zero_point = torch::stable::contiguous(*l.zero_point);
    STD_TORCH_CHECK(zero_point.scalar_type() == ScalarType::Char && zero_point.numel() == scale.numel(), l.op,
                    ": zero_point must be int8 of the size of scale, got another; call zo_kernels.ops.", l.op);
    p.zero_point = static_cast<const int8_t*>(zero_point.const_data_ptr());
  }
  if (l.bias) {
    bias = floats(*l.bias);
    STD_TORCH_CHECK(bias.numel() == p.n, l.op, ": bias must be [", p.n, "], got ", bias.numel(), " values; check it");
    p.bias = static_cast<const float*>(bias.const_data_ptr());
  }
  if (residual) {
    STD_TORCH_CHECK(residual->numel() == out.numel(), l.op, ": residual must have the shape of the output (", out.numel(),
                    " values), got ", residual->numel(), "; check which layer it follows");
    p.residual = residual->const_data_ptr();
    p.residual_dtype = dtype_of(l.op, "residual", *residual);
  }
  p.activation = activation_of(l.activation);

  // The perturbation.
  if (!l.draws.empty()) {
    STD_TORCH_CHECK(l.coeffs && l.coeffs->is_cpu() && l.coeffs->is_contiguous() &&
                        l.coeffs->scalar_type() == ScalarType::Float && l.coeffs->numel() == p.sets &&
                        g.rows() % p.sets == 0,
                    l.op, ": coeffs must be contiguous float32 on the CPU, one for each of ", p.sets,
                    " draws that share the rows evenly, got others; call zo_kernels.ops.", l.op);
    p.coeffs = static_cast<const float*>(l.coeffs->const_data_ptr());
    p.draws = l.draws.data();
    p.seed = static_cast<uint64_t>(l.seed);
    p.stream = static_cast<uint32_t>(l.stream);
    if (l.perturb == "weight") p.perturb = Perturb::weight;
    if (l.perturb == "codes") p.perturb = Perturb::codes;
    if (p.perturb == Perturb::none) {
      p.scale = perturbed_scales(l, p.scale, scale.numel(), p.coeffs, memory);
      p.scale_stride = scale.numel();
    }
    for (int64_t s = 0; p.perturb == Perturb::codes && s < p.sets; ++s) {
      const float d = p.coeffs[s];
      STD_TORCH_CHECK(d == static_cast<float>(static_cast<int>(d)) && std::abs(d) <= static_cast<float>(l.headroom), l.op,
                      ": coeffs must be whole numbers of at most ", l.headroom, " (headroom) for perturb='codes', got ", d,
                      "; use perturb='weight', or quantize with more headroom");
    }
  }

  // The activations.
  const int64_t tap_groups = p.groups == 1 ? 1 : p.groups / p.taps;
  const int64_t pixels_per_scale = per_sample ? g.height * g.width : 1;
  const Pixels a = integers ? integer_pixels(l, x, pixels, channels, pixels_per_scale, tap_groups, memory)
                            : float_pixels(l, x, pixels, channels, memory);
  STD_TORCH_CHECK(pixels * a.stride <= std::numeric_limits<int32_t>::max(), l.op, ": x must have less than 2^31 values, got ",
                  pixels * a.stride, "; split the batch");
  p.a = a.data;
  p.has_minus_128 = a.has_minus_128;
  char* zeros = memory.take<char>((a.stride + 64) * (integers ? 1 : 4));
  std::fill_n(zeros, (a.stride + 64) * (integers ? 1 : 4), char{0});
  p.zeros = zeros;
  fill_tables(p, g, a, per_sample, memory);
  const std::vector<Chunk> chunks = chunks_of(p.taps, p.channels, p.groups, integers);
  p.chunks = chunks.data();
  p.chunk_count = static_cast<int64_t>(chunks.size());
  run(p);
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_rows(Tensor x, bool per_sample, MaybeTensor in_scale) {
  const std::string op = "quantize_rows";
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1 && (!per_sample || x.dim() == 4), op, ": x must be on the CPU, [..., K] or [B, ",
                  "C, H, W], got ", x.dim(), " dimensions; call zo_kernels.ops.quantize_rows");
  const Tensor pixels = per_sample ? pixels_last(x) : torch::stable::contiguous(x);
  const int64_t channels = pixels.size(pixels.dim() - 1);
  std::vector<int64_t> lead(pixels.sizes().begin(), pixels.sizes().end() - 1);
  if (per_sample) lead.resize(1);
  Tensor codes = new_output(x, pixels.sizes(), ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, lead, ScalarType::Float);
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  if (pixels.numel() == 0) {
    std::fill_n(scales, scale.numel(), 0.0f);
  } else {
    Quantize q = quantize_of(op, pixels, channels, in_scale);
    q.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
    q.padded = channels;
    const int64_t rows = pixels.numel() / channels;
    quantize_all(q, rows, per_sample ? rows / x.size(0) : 1, scales);
  }
  return {per_sample ? channels_first(codes) : codes, scale};
}

Tensor qlinear(Tensor x, Tensor qweight, Tensor scale, MaybeTensor zero_point, MaybeTensor bias, int64_t bits,
               int64_t act_bits, MaybeTensor x_scale, MaybeTensor in_scale, std::string activation, MaybeTensor residual,
               std::string perturb, std::string kind, int64_t seed, int64_t stream, Numbers draws, MaybeTensor coeffs,
               int64_t headroom, MaybeDtype out_dtype) {
  const Layer l{"qlinear", qweight, scale, zero_point, bias, bits, act_bits, x_scale, in_scale, activation, residual,
                perturb, kind, seed, stream, draws, coeffs, headroom, out_dtype};
  const Tensor rows = torch::stable::contiguous(x);
  const int64_t channels = rows.size(rows.dim() - 1);
  std::vector<int64_t> shape(rows.sizes().begin(), rows.sizes().end());
  shape.back() = scale.size(0);
  const int64_t count = channels == 0 ? 0 : rows.numel() / channels;
  const Geometry g{1, count, 1, count, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
  const MaybeTensor added = residual ? MaybeTensor(torch::stable::contiguous(*residual)) : residual;
  return multiply_layer(l, rows, added, g, channels, false, shape);
}

Tensor qconv2d(Tensor x, Tensor qweight, Tensor scale, MaybeTensor zero_point, MaybeTensor bias, Numbers kernel_size,
               Numbers stride, Numbers padding, Numbers dilation, int64_t groups, int64_t bits, int64_t act_bits,
               MaybeTensor x_scale, MaybeTensor in_scale, std::string activation, MaybeTensor residual,
               std::string perturb, std::string kind, int64_t seed, int64_t stream, Numbers draws, MaybeTensor coeffs,
               int64_t headroom, MaybeDtype out_dtype) {
  const Layer l{"qconv2d", qweight, scale, zero_point, bias, bits, act_bits, x_scale, in_scale, activation, residual,
                perturb, kind, seed, stream, draws, coeffs, headroom, out_dtype};
  STD_TORCH_CHECK(groups == 1 && x.dim() == 4 && kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 &&
                      dilation.size() == 2 && std::min({stride[0], stride[1], dilation[0], dilation[1]}) >= 1,
                  "qconv2d: x must be [B, C, H, W] and groups 1, got others; call zo_kernels.ops.qconv2d");
  const Tensor pixels = pixels_last(x);
  Geometry g{pixels.size(0), pixels.size(1), pixels.size(2), 0, 0, {}, {}, {}, {}};
  int64_t* const out_size[2] = {&g.out_height, &g.out_width};
  for (int i = 0; i < 2; ++i) {
    g.kernel[i] = kernel_size[i];
    g.stride[i] = stride[i];
    g.padding[i] = padding[i];
    g.dilation[i] = dilation[i];
    const int64_t room = pixels.size(1 + i) + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "qconv2d: x must be as large as the kernel, got ", pixels.size(1 + i),
                    " pixels; pad it or use a larger picture");
    *out_size[i] = room / stride[i] + 1;
  }
  const MaybeTensor added = residual ? MaybeTensor(pixels_last(*residual)) : residual;
  return channels_first(multiply_layer(l, pixels, added, g, pixels.size(3), true,
                                       {g.samples, g.out_height, g.out_width, scale.size(0)}));
}

}  // namespace zo::cpu
