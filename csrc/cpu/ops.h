// SPDX-License-Identifier: Apache-2.0
// Schemas and meanings: the files of these names in zo_kernels/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
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

torch::stable::Tensor group_norm(torch::stable::Tensor x, int64_t groups, MaybeTensor weight, MaybeTensor bias,
                                 double eps, MaybeTensor shift, std::string activation);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> group_norm_quantize(torch::stable::Tensor x, int64_t groups,
                                                                             MaybeTensor weight, MaybeTensor bias,
                                                                             double eps, MaybeTensor shift,
                                                                             std::string activation);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> layer_norm_quantize(torch::stable::Tensor x, MaybeTensor weight,
                                                                             MaybeTensor bias, double eps);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> geglu_quantize(torch::stable::Tensor x);

torch::stable::Tensor qattention(torch::stable::Tensor query, torch::stable::Tensor key, torch::stable::Tensor value,
                                 int64_t heads, double scale);

using MaybeDtype = std::optional<torch::headeronly::ScalarType>;

std::tuple<torch::stable::Tensor, torch::stable::Tensor> quantize_rows(torch::stable::Tensor x, bool per_sample,
                                                                       MaybeTensor in_scale);

torch::stable::Tensor qlinear(torch::stable::Tensor x, torch::stable::Tensor qweight, torch::stable::Tensor scale,
                              MaybeTensor zero_point, MaybeTensor bias, int64_t bits, int64_t act_bits,
                              MaybeTensor x_scale, MaybeTensor in_scale, std::string activation,
                              MaybeTensor residual, std::string perturb, std::string kind, int64_t seed,
                              int64_t stream, Numbers draws, MaybeTensor coeffs, int64_t headroom,
                              MaybeDtype out_dtype);

torch::stable::Tensor qconv2d(torch::stable::Tensor x, torch::stable::Tensor qweight, torch::stable::Tensor scale,
                              MaybeTensor zero_point, MaybeTensor bias, Numbers kernel_size, Numbers stride,
                              Numbers padding, Numbers dilation, int64_t groups, int64_t bits, int64_t act_bits,
                              MaybeTensor x_scale, MaybeTensor in_scale, std::string activation,
                              MaybeTensor residual, std::string perturb, std::string kind, int64_t seed,
                              int64_t stream, Numbers draws, MaybeTensor coeffs, int64_t headroom,
                              MaybeDtype out_dtype);

}  // namespace zo::cpu
