// SPDX-License-Identifier: Apache-2.0
// CPU kernels behind the schemas: what would read or write out of bounds is checked here, everything else
// in Python; then one parallel region over the chunks of all tensors.
#include "cpu/ops.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/add_noise.h"
#include "cpu/isa.h"

namespace zo::cpu {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements; 128 KiB of fp32 stays in L2
static_assert(kChunk % kChunkAlignment == 0);

struct Chunk {
  char* data;
  Dtype dtype;
  uint32_t stream;
  int64_t first, count;
};

Dtype dtype_of(const torch::stable::Tensor& t) {
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

}  // namespace

void add_noise_(std::vector<torch::stable::Tensor> params, std::vector<int64_t> streams, int64_t seed,
                std::vector<int64_t> draws, std::vector<double> scales, double decay, std::string kind) {
  STD_TORCH_CHECK(streams.size() == params.size(), "add_noise_: streams must hold one id per parameter, got ",
                  streams.size(), " for ", params.size(), "; number the parameters");
  STD_TORCH_CHECK(draws.size() == scales.size(), "add_noise_: scales must hold one value per draw, got ",
                  scales.size(), " for ", draws.size(), "; pair them");
  STD_TORCH_CHECK(kind == "normal" || kind == "rademacher",
                  "add_noise_: kind must be normal or rademacher, got ", kind, "; choose one of them");
  const Kind which = kind == "normal" ? Kind::normal : Kind::rademacher;
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < params.size(); ++i) {
    const auto& p = params[i];
    STD_TORCH_CHECK(p.is_contiguous(), "add_noise_: params must be contiguous here, got a strided one; ",
                    "call zo_kernels.ops.add_noise_, which falls back to the reference");
    const Dtype dtype = dtype_of(p);
    const int64_t size = p.element_size();
    for (int64_t first = 0; first < p.numel(); first += kChunk) {
      chunks.push_back({static_cast<char*>(p.mutable_data_ptr()) + first * size, dtype,
                        static_cast<uint32_t>(streams[i]), first, std::min(kChunk, p.numel() - first)});
    }
  }
  const std::vector<float> factors(scales.begin(), scales.end());
  isa();  // a bad ZO_CPU_ISA throws here, outside the parallel region
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = chunks[c];
      const NoiseTerms terms{static_cast<uint64_t>(seed), chunk.stream, which, static_cast<float>(decay),
                             static_cast<int64_t>(draws.size()), draws.data(), factors.data()};
      add_noise(chunk.data, chunk.dtype, chunk.first, chunk.count, terms);
    }
  });
}

}  // namespace zo::cpu
