// SPDX-License-Identifier: Apache-2.0
// CPU kernels behind the schemas: what would read or write out of bounds is checked here, everything else
// in Python; then one parallel region over the chunks of all tensors.
#include "cpu/ops.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/add_noise.h"

namespace zo::cpu {
namespace {

using torch::stable::Tensor;

constexpr int64_t kChunk = 1 << 15;  // elements; 128 KiB of fp32 stays in L2
static_assert(kChunk % kChunkAlignment == 0);

struct Chunk {
  char* data;
  Dtype dtype;
  uint32_t stream;
  int64_t first, count;
};

Dtype dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, "add_noise_: params must be float32, bfloat16 or float16, got another dtype; ",
                  "leave integer weights out and perturb their scales");
}

// A contiguous tensor whose storage was freed or shrunk under it still has its shape.
bool lies_in_its_storage(const Tensor& t) {
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return t.numel() == 0 ||
         t.numel() <= bytes / static_cast<int64_t>(t.element_size()) - t.storage_offset();
}

bool is_fp32_of(const Tensor& t, size_t count) {
  return t.scalar_type() == torch::headeronly::ScalarType::Float && t.is_cpu() && t.is_contiguous() &&
         t.numel() == static_cast<int64_t>(count) && lies_in_its_storage(t);
}

}  // namespace

void add_noise_(std::vector<Tensor> params, std::vector<int64_t> streams, int64_t seed,
                std::vector<int64_t> draws, Tensor scales, Tensor decay, std::string kind) {
  STD_TORCH_CHECK(streams.size() == params.size(),
                  "add_noise_: streams must hold one id per parameter, got ", streams.size(), " for ",
                  params.size(), "; number the parameters");
  STD_TORCH_CHECK(is_fp32_of(scales, draws.size()) && is_fp32_of(decay, 1),
                  "add_noise_: scales and decay must be contiguous float32 on the CPU, one scale a draw and "
                  "one decay, got others; call zo_kernels.ops.add_noise_");
  STD_TORCH_CHECK(kind == "normal" || kind == "rademacher",
                  "add_noise_: kind must be normal or rademacher, got ", kind, "; choose one of them");
  const Kind which = kind == "normal" ? Kind::normal : Kind::rademacher;
  const float keep = *static_cast<const float*>(decay.const_data_ptr());
  const float* factors = static_cast<const float*>(scales.const_data_ptr());

  std::vector<Chunk> chunks;
  std::vector<std::pair<Tensor, Tensor>> strided;  // parameter and its row-major copy
  for (size_t i = 0; i < params.size(); ++i) {
    Tensor p = params[i];
    STD_TORCH_CHECK(p.numel() <= max_elements(which), "add_noise_: params must have at most ",
                    max_elements(which), " elements, got ", p.numel(), "; split it");
    if (!p.is_contiguous()) {
      strided.emplace_back(p, torch::stable::contiguous(p));
      p = strided.back().second;
    }
    STD_TORCH_CHECK(p.is_cpu() && lies_in_its_storage(p),
                    "add_noise_: params must be on the CPU with their storage allocated, got params[", i,
                    "] of ", p.numel(), " elements, which is not; gather it first");
    const Dtype dtype = dtype_of(p);
    const int64_t size = p.element_size();
    for (int64_t first = 0; first < p.numel(); first += kChunk) {
      chunks.push_back({static_cast<char*>(p.mutable_data_ptr()) + first * size, dtype,
                        static_cast<uint32_t>(streams[i]), first, std::min(kChunk, p.numel() - first)});
    }
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = chunks[c];
      const NoiseTerms terms{static_cast<uint64_t>(seed), chunk.stream, which, keep,
                             static_cast<int64_t>(draws.size()), draws.data(), factors};
      add_noise(chunk.data, chunk.dtype, chunk.first, chunk.count, terms);
    }
  });
  for (auto& [param, copy] : strided) torch::stable::copy_(param, copy);
}

}  // namespace zo::cpu
