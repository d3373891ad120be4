// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of `qlinear` with few rows behind one op of torch, `_qlinear_few_rows`, which
// zo_kernels/kernels/_few_rows.py calls. What would read or write out of bounds is checked here, the rest there.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cuda_runtime.h>

#include <optional>

#define ZO_LAUNCHERS
#include "cuda/qlinear.h"

namespace zo::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void require(bool ok, const char* what) {
  STD_TORCH_CHECK(ok, "_qlinear_few_rows: ", what, ", got another; call qlinear of zo_kernels.ops");
}

const void* on_device(const Tensor& t, int64_t count, const char* what) {
  require(t.is_cuda() && t.is_contiguous() && t.numel() == count, what);
  return t.const_data_ptr();
}

Dtype dtype_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
          "x, bias and y must be float32, bfloat16 or float16");
  return type == ScalarType::Float ? Dtype::f32 : type == ScalarType::Half ? Dtype::f16 : Dtype::bf16;
}

void qlinear_few_rows(Tensor x, Tensor qweight, Tensor scale, std::optional<Tensor> zero_point,
                      std::optional<Tensor> bias, int64_t bits, Tensor y) {
  require(x.dim() == 2 && y.dim() == 2 && x.size(0) >= 1 && x.size(0) <= kMostRows && y.size(0) == x.size(0),
          "x [M, K] and y [M, N] must have 1 to 16 rows");
  const int64_t k = x.size(1), n = y.size(1), panels = (n + 15) / 16;
  require(n > 0 && k > 0 && k % kChunk == 0 && k < INT32_MAX && (bits == 4 || bits == 8),
          "K must be a multiple of 64, and bits 4 or 8");
  require(scale.scalar_type() == ScalarType::Float && scale.numel() > 0 && scale.numel() % n == 0,
          "scale must be float32 [N, groups]");
  const int64_t groups = scale.numel() / n;
  require(k / kChunk % groups == 0, "a group must be a multiple of 64 channels");

  Product p{};
  p.x = on_device(x, x.numel(), "x must be contiguous on the GPU");
  p.weight = on_device(qweight, panels * 16 * k * bits / 8, "qweight must be packed [N, K] on the GPU");
  p.scale = static_cast<const float*>(on_device(scale, n * groups, "scale must be contiguous on the GPU"));
  if (zero_point) {
    require(zero_point->scalar_type() == ScalarType::Char, "zero_point must be int8");
    p.zero = static_cast<const int8_t*>(on_device(*zero_point, n * groups, "zero_point must be as scale is"));
  }
  on_device(y, y.numel(), "y must be contiguous on the GPU");
  p.y = y.mutable_data_ptr();
  const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight);
  require(address % 16 == 0, "addresses of x and qweight must be multiples of 16");
  p.n = n, p.m = static_cast<int>(x.size(0)), p.k = static_cast<int>(k), p.groups = static_cast<int>(groups);
  p.bits = static_cast<int>(bits);
  p.x_dtype = dtype_of(x), p.y_dtype = dtype_of(y);
  require(p.x_dtype != Dtype::f32, "x must be bfloat16 or float16");
  if (bias) {
    p.bias = on_device(*bias, n, "bias must be contiguous [N] on the GPU");
    p.bias_dtype = dtype_of(*bias);
  }

  const auto device = static_cast<int32_t>(x.get_device());
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const cudaError_t error = qlinear(p, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "qlinear: the launch must succeed, got ", cudaGetErrorString(error),
                  "; unset ZO_CUDA_CPP to run Triton");
}

}  // namespace
}  // namespace zo::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(zo_kernels, m) {
  m.def(
      "_qlinear_few_rows(Tensor x, Tensor qweight, Tensor scale, Tensor? zero_point, Tensor? bias, int bits, "
      "Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(zo_kernels, CUDA, m) { m.impl("_qlinear_few_rows", TORCH_BOX(&zo::cuda::qlinear_few_rows)); }
