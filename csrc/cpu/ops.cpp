// SPDX-License-Identifier: Apache-2.0
// CPU kernels behind the schemas: what would read or write out of bounds is checked here, everything else
// in Python; then one parallel region over the chunks of all tensors.
#include "cpu/ops.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/update.h"

namespace zo::cpu {
namespace {

using torch::stable::Tensor;

constexpr int64_t kChunk = 1 << 15;  // elements; 128 KiB of fp32 stays in L2
static_assert(kChunk % kChunkAlignment == 0);
constexpr int64_t kMaxRounded = int64_t{1} << 35;  // elements that a stream has random bits for

Dtype dtype_of(const std::string& op, const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": params must be float32, bfloat16 or float16, got another dtype; ",
                  "leave integer weights out and perturb their scales");
}

// A contiguous tensor whose storage was freed or shrunk under it still has its shape.
bool lies_in_its_storage(const Tensor& t) {
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return t.numel() == 0 ||
         t.numel() <= bytes / static_cast<int64_t>(t.element_size()) - t.storage_offset();
}

bool is_fp32_of(const Tensor& t, int64_t count) {
  return t.scalar_type() == torch::headeronly::ScalarType::Float && t.is_cpu() && t.is_contiguous() &&
         t.numel() == count && lies_in_its_storage(t);
}

// The arguments that every op has. `hyper` holds `hypers` numbers; `states` are none or one list of tensors
// for each thing that the op keeps, fp32 and of the sizes of the params.
struct Arguments {
  std::string name, factors_name, hyper_name;
  Tensors& params;
  std::vector<Tensors*> states;
  const Numbers &streams, &draws;
  const Tensor &factors, &hyper;
  int64_t hypers;
  const std::string& kind;
  const MaybeTensor& quanta;
};

void check(const Arguments& a) {
  const size_t count = a.params.size();
  STD_TORCH_CHECK(a.streams.size() == count, a.name, ": streams must hold one id per parameter, got ",
                  a.streams.size(), " for ", count, "; number the parameters");
  STD_TORCH_CHECK(is_fp32_of(a.factors, static_cast<int64_t>(a.draws.size())) && is_fp32_of(a.hyper, a.hypers),
                  a.name, ": ", a.factors_name, " and ", a.hyper_name,
                  " must be contiguous float32 on the CPU, one factor a draw and ", a.hypers, " of ",
                  a.hyper_name, ", got others; call zo_kernels.ops.", a.name);
  STD_TORCH_CHECK(!a.quanta || is_fp32_of(*a.quanta, static_cast<int64_t>(count)), a.name,
                  ": quanta must be contiguous float32 on the CPU, one a parameter, got others; call "
                  "zo_kernels.ops.", a.name);
  STD_TORCH_CHECK(a.kind == "normal" || a.kind == "rademacher", a.name,
                  ": kind must be normal or rademacher, got ", a.kind, "; choose one of them");
  for (const Tensors* tensors : a.states) {
    bool fits = tensors->size() == count;
    for (size_t i = 0; fits && i < count; ++i) fits = is_fp32_of((*tensors)[i], a.params[i].numel());
    STD_TORCH_CHECK(fits, a.name, ": states must be one contiguous float32 tensor on the CPU for each "
                    "parameter, of its size, got others; call zo_kernels.ops.", a.name);
  }
}

// `call` as it comes has what only this op has.
void run(Arguments a, Call call, int64_t seed, MaybeNumber round_draw) {
  check(a);
  call.seed = static_cast<uint64_t>(seed);
  call.kind = a.kind == "normal" ? Kind::normal : Kind::rademacher;
  call.count = static_cast<int64_t>(a.draws.size());
  call.draws = a.draws.data();
  call.factors = static_cast<const float*>(a.factors.const_data_ptr());
  call.hyper = static_cast<const float*>(a.hyper.const_data_ptr());
  call.rounds = round_draw.has_value();
  call.round_draw = round_draw.value_or(0);
  const int64_t limit = std::min(max_elements(call.kind), call.rounds ? kMaxRounded : INT64_MAX);

  std::vector<Piece> pieces;
  std::vector<std::pair<Tensor, Tensor>> strided;  // parameter and its row-major copy
  for (size_t i = 0; i < a.params.size(); ++i) {
    Tensor p = a.params[i];
    STD_TORCH_CHECK(p.numel() <= limit, a.name, ": params must have at most ", limit, " elements, got ",
                    p.numel(), "; split it");
    if (!p.is_contiguous()) {
      strided.emplace_back(p, torch::stable::contiguous(p));
      p = strided.back().second;
    }
    STD_TORCH_CHECK(p.is_cpu() && lies_in_its_storage(p), a.name,
                    ": params must be on the CPU with their storage allocated, got params[", i, "] of ",
                    p.numel(), " elements, which is not; gather it first");
    Piece piece{nullptr, dtype_of(a.name, p), static_cast<uint32_t>(a.streams[i]), 0.0f, 0, 0, {}};
    if (a.quanta) piece.quantum = static_cast<const float*>(a.quanta->const_data_ptr())[i];
    const int64_t size = p.element_size();
    for (int64_t first = 0; first < p.numel(); first += kChunk) {
      piece.p = static_cast<char*>(p.mutable_data_ptr()) + first * size;
      piece.first = first;
      piece.n = std::min(kChunk, p.numel() - first);
      for (size_t k = 0; k < a.states.size(); ++k) {
        piece.state[k] = static_cast<float*>((*a.states[k])[i].mutable_data_ptr()) + first;
      }
      pieces.push_back(piece);
    }
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) update(pieces[c], call);
  });
  for (auto& [param, copy] : strided) torch::stable::copy_(param, copy);
}

}  // namespace

void add_noise_(Tensors params, Numbers streams, int64_t seed, Numbers draws, Tensor scales, Tensor decay,
                std::string kind, MaybeTensor quanta, MaybeNumber round_draw) {
  Call call{};
  call.op = Op::add_noise;
  run({"add_noise_", "scales", "decay", params, {}, streams, draws, scales, decay, 1, kind, quanta}, call,
      seed, round_draw);
}

void zo_sgd_(Tensors params, Tensors buffers, Numbers streams, int64_t seed, Numbers draws, Tensor coeffs,
             Tensor hyper, bool sign, std::string kind, MaybeTensor quanta, MaybeNumber round_draw) {
  Call call{};
  call.op = Op::zo_sgd;
  call.sign = sign;
  std::vector<Tensors*> states;
  if (!buffers.empty()) states.push_back(&buffers);
  run({"zo_sgd_", "coeffs", "hyper", params, states, streams, draws, coeffs, hyper, 3, kind, quanta}, call,
      seed, round_draw);
}

void zo_adam_(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Numbers streams, int64_t seed,
              Numbers draws, Tensor coeffs, Tensor hyper, std::string kind, MaybeTensor quanta,
              MaybeNumber round_draw) {
  Call call{};
  call.op = Op::zo_adam;
  run({"zo_adam_", "coeffs", "hyper", params, {&exp_avgs, &exp_avg_sqs}, streams, draws, coeffs, hyper, 7,
       kind, quanta},
      call, seed, round_draw);
}

}  // namespace zo::cpu
