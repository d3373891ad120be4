// SPDX-License-Identifier: Apache-2.0
// Memory of large outputs: pages that one layer's output had serve the next one's.
//
// malloc either maps such blocks anew each time, and the faults of their pages take a good part of a forward pass, or
// keeps them among all others in a heap that fragments: it then holds several times what is alive. Here they lie apart
// from smaller and longer-lived blocks.
#pragma once

#include <cstdint>

namespace zo::cpu {

constexpr int64_t kLarge = 1 << 18;      // bytes of an output that is worth a block of the pool
constexpr int64_t kRegion = 64 << 20;    // bytes that are mapped at once; a larger block has a region of its own
constexpr int64_t kKept = 2 * kRegion;   // free bytes above which a region without a block goes back to the system

// A block of that many bytes at a page's begin, not cleared; null where the system has no memory. Any thread may call.
void* take_block(int64_t bytes);

// Gives back a block of `take_block`; any thread may call.
void give_block(void* block);

// Gives every region without a block back to the system; returns their bytes. Any thread may call.
int64_t trim_pool();

struct PoolUse {
  int64_t mapped, taken;  // bytes
};
PoolUse pool_use();

}  // namespace zo::cpu
