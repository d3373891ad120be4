// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace zo::cpu {

// Schema and meaning: zo_kernels/ops/add_noise.py.
void add_noise_(std::vector<torch::stable::Tensor> params, std::vector<int64_t> streams, int64_t seed,
                std::vector<int64_t> draws, torch::stable::Tensor scales, torch::stable::Tensor decay,
                std::string kind);

}  // namespace zo::cpu
