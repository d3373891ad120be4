// SPDX-License-Identifier: Apache-2.0
// Work shared out as threads ask for it: cores are seldom equally fast, and a half each would wait for the slower.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace zo::cpu {

// run(begin, end) until [0, count) is done. A range is a share of what is left, so that the first ones are long (what
// a range prepares is prepared seldom) and the last ones end together; it begins at a multiple of `unit`.
template <class Run>
void share_out(int64_t count, int64_t unit, const Run& run) {
  const int64_t units = (count + unit - 1) / unit;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), units);
  if (threads <= 1) {
    if (count > 0) run(0, count);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.load(); begin < units;) {
      const int64_t size = std::max<int64_t>(1, (units - begin) / (2 * threads));
      if (!next.compare_exchange_weak(begin, begin + size)) continue;
      run(begin * unit, std::min(count, (begin + size) * unit));
      begin = next.load();
    }
  });
}

}  // namespace zo::cpu
