// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels behind one op of torch, `_update_table`, which takes the table and the numbers that the Triton
// launcher makes (zo_kernels/kernels/_updates.py). Memory is addressed by the table: no argument is written.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cuda_runtime.h>

#include <string>

#define ZO_LAUNCHERS
#include "cuda/update.h"

namespace zo::cuda {
namespace {

using torch::stable::Tensor;

template <class T>
const T* on_device(const Tensor& t, int64_t least) {
  STD_TORCH_CHECK(t.is_cuda() && t.is_contiguous() && t.numel() >= least &&
                      t.element_size() == static_cast<int64_t>(sizeof(T)),
                  "_update_table: tables and numbers must be contiguous on the GPU, got others; call add_noise_, "
                  "zo_sgd_ or zo_adam_ of zo_kernels.ops");
  return static_cast<const T*>(t.const_data_ptr());
}

void update_table(std::string name, Tensor rows, Tensor chunks, Tensor base, Tensor draws, Tensor factors,
                  Tensor hyper, int64_t seed, int64_t terms, int64_t tile, int64_t tiles, std::string kind,
                  int64_t dtype, bool grid, bool rounds, bool aligned, bool sign, bool buffer) {
  const bool adds = name == "add_noise_", adam = name == "zo_adam_";
  STD_TORCH_CHECK((adds || adam || name == "zo_sgd_") && (kind == "normal" || kind == "rademacher") && dtype >= 0 &&
                      dtype <= 2 && terms >= 0 && tile > 0 && tile % 128 == 0 && tiles > 0,
                  "_update_table: arguments must be those of zo_kernels.kernels._updates, got ", name, ", ", kind,
                  "; call it from there");
  Launch c{};
  c.rows = reinterpret_cast<const Row*>(on_device<int64_t>(rows, 6));
  c.chunks = on_device<int64_t>(chunks, 1);
  c.count = chunks.numel();
  c.tile = tile, c.tiles = tiles;
  c.base = on_device<int64_t>(base, 1);
  c.draws = on_device<int64_t>(draws, terms + 1);
  c.factors = on_device<float>(factors, terms);
  c.hyper = on_device<float>(hyper, adds ? 1 : adam ? 7 : 3);
  c.terms = terms;
  c.seed = static_cast<uint64_t>(seed);
  c.kind = kind == "normal" ? Kind::normal : Kind::rademacher;
  c.dtype = static_cast<Dtype>(dtype);
  c.grid = grid, c.rounds = rounds, c.aligned = aligned, c.sign = sign, c.buffer = buffer;

  const auto device = static_cast<int32_t>(rows.get_device());
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto run = adds ? add_noise : adam ? zo_adam : zo_sgd;
  const cudaError_t error = run(c, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, name, ": the launch must succeed, got ", cudaGetErrorString(error),
                  "; unset ZO_CUDA_CPP to run Triton");
}

}  // namespace
}  // namespace zo::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(zo_kernels, m) {
  m.def(
      "_update_table(str name, Tensor rows, Tensor chunks, Tensor base, Tensor draws, Tensor factors, Tensor hyper, "
      "int seed, int terms, int tile, int tiles, str kind, int dtype, bool grid, bool rounds, bool aligned, bool sign, "
      "bool buffer) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(zo_kernels, CUDA, m) { m.impl("_update_table", TORCH_BOX(&zo::cuda::update_table)); }
