// SPDX-License-Identifier: Apache-2.0
// qattention behind its schema.
#include <algorithm>

#include "cpu/activations.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/share_out.h"

namespace zo::cpu {

using torch::stable::Tensor;

Tensor qattention(Tensor query, Tensor key, Tensor value, int64_t heads, double scale) {
  const auto rows_of = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const Tensor q = rows_of(query), k = rows_of(key), v = rows_of(value);
  STD_TORCH_CHECK(q.is_cpu() && q.dim() == 3 && k.dim() == 3 && k.sizes().equals(v.sizes()) && q.size(0) == k.size(0) &&
                      q.size(2) == k.size(2) && heads >= 1 && q.size(2) % heads == 0 && k.size(1) >= 1 &&
                      q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "qattention: query must be [B, M, heads * D], key and value [B, L, heads * D] of its dtype, got others; ",
                  "call zo_kernels.ops.qattention");
  Tensor out = new_output(q, q.sizes(), q.scalar_type());
  if (out.numel() == 0) return out;
  Attention a{};
  a.dtype = dtype_of("qattention", "query", q);
  a.queries = q.size(1);
  a.keys = k.size(1);
  a.stride = q.size(2);
  a.depth = a.stride / heads;
  a.scale = static_cast<float>(scale);
  const int64_t groups = (a.queries + kAttentionRows - 1) / kAttentionRows;
  const auto size = static_cast<int64_t>(q.element_size());
  // A group of queries of a head is the unit; a range prepares the keys of a head once for all that it has of it.
  share_out(q.size(0) * heads * groups, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t head = begin / groups, stop = std::min(end, (head + 1) * groups);
      const int64_t sample = head / heads, channel = head % heads * a.depth;
      const auto at = [&](int64_t rows) { return (sample * rows * a.stride + channel) * size; };
      Attention one = a;
      one.query = static_cast<const char*>(q.const_data_ptr()) + at(a.queries);
      one.key = static_cast<const char*>(k.const_data_ptr()) + at(a.keys);
      one.value = static_cast<const char*>(v.const_data_ptr()) + at(a.keys);
      one.out = static_cast<char*>(out.mutable_data_ptr()) + at(a.queries);
      const int64_t first = begin % groups * kAttentionRows;
      kernels().attend(one, first, std::min(a.queries, first + (stop - begin) * kAttentionRows));
      begin = stop;
    }
  });
  return out;
}

}  // namespace zo::cpu
