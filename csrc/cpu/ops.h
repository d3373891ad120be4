// SPDX-License-Identifier: Apache-2.0
// Schemas and meanings: the files of these names in zo_kernels/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace zo::cpu {

using Tensors = std::vector<torch::stable::Tensor>;
using Numbers = std::vector<int64_t>;
using MaybeTensor = std::optional<torch::stable::Tensor>;
using MaybeNumber = std::optional<int64_t>;

void add_noise_(Tensors params, Numbers streams, int64_t seed, Numbers draws, torch::stable::Tensor scales,
                torch::stable::Tensor decay, std::string kind, MaybeTensor quanta, MaybeNumber round_draw);

void zo_sgd_(Tensors params, Tensors buffers, Numbers streams, int64_t seed, Numbers draws,
             torch::stable::Tensor coeffs, torch::stable::Tensor hyper, bool sign, std::string kind,
             MaybeTensor quanta, MaybeNumber round_draw);

void zo_adam_(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Numbers streams, int64_t seed,
              Numbers draws, torch::stable::Tensor coeffs, torch::stable::Tensor hyper, std::string kind,
              MaybeTensor quanta, MaybeNumber round_draw);

}  // namespace zo::cpu
