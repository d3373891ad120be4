// SPDX-License-Identifier: Apache-2.0
// Attention of one head in fixed point, over raw pointers; no torch here. See zo_kernels/ops/qattention.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/update.h"

namespace zo::cpu {

struct Attention {
  const void *query, *key, *value;  // first row of the head
  void* out;
  Dtype dtype;      // of all four
  int64_t queries, keys;
  int64_t depth;    // channels of the head
  int64_t stride;   // elements from row to row, of all four
  float scale;      // times query . key
};

constexpr int64_t kAttentionRows = 192;  // queries that visit a block of keys in turn, their sums in L2
constexpr int kBlockKeys = 128;          // whose weights and values are products of integers in L1; of deep heads half
constexpr int64_t kDeep = 64;            // channels, above which a head is deep
constexpr int kWeightCode = 16383;       // of a weight of 1
constexpr int kValueCode = 1023;         // of a channel's largest value
static_assert(int64_t{kWeightCode} * kValueCode * kBlockKeys < int64_t{1} << 31);

// Of the largest query and key: sums of products stay below 2^30.
inline int largest_code(int64_t depth) {
  const int code = static_cast<int>(std::sqrt(1073741823.0 / static_cast<double>(depth)));
  return code < 32767 ? code : 32767;
}

}  // namespace zo::cpu
