// SPDX-License-Identifier: Apache-2.0
// What the ops on activations share: tensors as pixels, and work cut into ranges for torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "cpu/pool.h"
#include "cpu/product.h"

namespace zo::cpu {

constexpr int64_t kGrain = 1 << 14;  // values that are worth a thread

inline Dtype dtype_of(const std::string& op, const char* name, const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16, got another dtype; cast it, or call ",
                  "torch.ops.zo_kernels.", op, ".reference");
}

inline Activation activation_of(const std::string& name) {
  return name == "silu" ? Activation::silu : name == "gelu" ? Activation::gelu : Activation::none;
}

// An output of an op: contiguous, on the CPU, not written yet. Large ones have a block of the pool.
inline torch::stable::Tensor new_output(const torch::stable::Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                        torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  const int64_t value_bytes = dtype == ScalarType::Char ? 1 : half ? 2 : dtype == ScalarType::Float ? 4 : 0;
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = count;
  void* block = count * value_bytes < kLarge ? nullptr : take_block(count * value_bytes);
  if (block == nullptr) return torch::stable::new_empty(like, sizes, dtype);
  return torch::stable::from_blob(block, sizes, strides, like.device(), dtype, give_block);
}

inline torch::stable::Tensor floats(const torch::stable::Tensor& t) {
  if (t.scalar_type() == torch::headeronly::ScalarType::Float) return torch::stable::contiguous(t);
  torch::stable::Tensor out = torch::stable::new_empty(t, t.sizes(), torch::headeronly::ScalarType::Float);
  return torch::stable::copy_(out, t);
}

// [B, C, H, W] as contiguous [B, H, W, C]: a view where the memory is channels_last.
inline torch::stable::Tensor pixels_last(const torch::stable::Tensor& t) {
  return torch::stable::contiguous(torch::stable::transpose(torch::stable::transpose(t, 1, 2), 2, 3));
}
inline torch::stable::Tensor channels_first(const torch::stable::Tensor& t) {
  return torch::stable::transpose(torch::stable::transpose(t, 2, 3), 1, 2);
}

// run(sample, begin, end) over `rows` rows of `channels` values, `sample_rows` a sample, from whose first row begin
// and end are counted.
template <class Run>
void each_sample_range(int64_t rows, int64_t sample_rows, int64_t channels, const Run& run) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / channels), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / sample_rows, first = sample * sample_rows;
      const int64_t stop = std::min(end, first + sample_rows);
      run(sample, begin - first, stop - first);
      begin = stop;
    }
  });
}

// Largest magnitudes of samples, by their bits, from several threads.
class SampleMaxima {
 public:
  explicit SampleMaxima(int64_t samples) : bits_(new std::atomic<uint32_t>[static_cast<size_t>(samples)]()) {}
  void raise(int64_t sample, uint32_t to) {
    uint32_t now = bits_[sample].load();
    while (now < to && !bits_[sample].compare_exchange_weak(now, to)) {
    }
  }
  uint32_t of(int64_t sample) const { return bits_[sample].load(); }

 private:
  std::unique_ptr<std::atomic<uint32_t>[]> bits_;
};

}  // namespace zo::cpu
