// SPDX-License-Identifier: Apache-2.0
#include "cpu/pool.h"

#include <sys/mman.h>

#include <iterator>
#include <map>
#include <mutex>

namespace zo::cpu {
namespace {

constexpr int64_t kPage = 1 << 12, kHugePage = 1 << 21;

int64_t rounded_up(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }

// Pages that the system may make huge: cleared in one fault instead of 512.
char* map_pages(int64_t bytes) {
  const auto padded = static_cast<size_t>(bytes + kHugePage);
  void* at = mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(at);
  const auto head = (kHugePage - static_cast<int64_t>(reinterpret_cast<uintptr_t>(at) % kHugePage)) % kHugePage;
  if (head > 0) munmap(begin, static_cast<size_t>(head));
  munmap(begin + head + bytes, static_cast<size_t>(kHugePage - head));
#ifdef MADV_HUGEPAGE
  madvise(begin + head, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  return begin + head;
}

using Blocks = std::map<char*, int64_t>;  // begin -> bytes

struct Region {
  int64_t bytes = 0;
  Blocks holes;
  bool is_free() const { return holes.size() == 1 && holes.begin()->second == bytes; }
};

class Pool {
 public:
  void* take(int64_t bytes) {
    bytes = rounded_up(bytes, kPage);
    const std::lock_guard<std::mutex> lock(mutex_);
    // The lowest hole that it fits into: what lives long gathers below, and regions above become free.
    for (auto& [begin, region] : regions_) {
      for (auto hole = region.holes.begin(); hole != region.holes.end(); ++hole) {
        if (hole->second >= bytes) return cut(region, hole, bytes);
      }
    }
    // Free regions that are too small for it would lie idle beside it.
    if (bytes > kRegion) unmap_free();
    const int64_t size = rounded_up(bytes > kRegion ? bytes : kRegion, kHugePage);
    char* begin = map_pages(size);
    if (begin == nullptr) return nullptr;
    use_.mapped += size;
    Region& region = regions_[begin];
    region.bytes = size;
    return cut(region, region.holes.emplace(begin, size).first, bytes);
  }

  void give(char* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto taken = taken_.find(block);
    const int64_t bytes = taken->second;
    taken_.erase(taken);
    use_.taken -= bytes;
    const auto at = std::prev(regions_.upper_bound(block));
    Region& region = at->second;
    close(region.holes, region.holes.emplace(block, bytes).first);
    if (region.is_free() && use_.mapped - use_.taken > kKept) unmap(at);
  }

  int64_t trim() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return unmap_free();
  }

  PoolUse use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return use_;
  }

 private:
  using Regions = std::map<char*, Region>;  // begin -> region

  Regions::iterator unmap(Regions::iterator at) {
    munmap(at->first, static_cast<size_t>(at->second.bytes));
    use_.mapped -= at->second.bytes;
    return regions_.erase(at);
  }

  // Every region without a block; returns their bytes.
  int64_t unmap_free() {
    const int64_t before = use_.mapped;
    for (auto at = regions_.begin(); at != regions_.end();) at = at->second.is_free() ? unmap(at) : std::next(at);
    return before - use_.mapped;
  }

  // The first bytes of a hole become a block.
  char* cut(Region& region, Blocks::iterator hole, int64_t bytes) {
    const auto [begin, size] = *hole;
    region.holes.erase(hole);
    if (size > bytes) region.holes.emplace(begin + bytes, size - bytes);
    taken_.emplace(begin, bytes);
    use_.taken += bytes;
    return begin;
  }

  // One hole of it and those that it touches.
  static void close(Blocks& holes, Blocks::iterator hole) {
    const auto next = std::next(hole);
    if (next != holes.end() && hole->first + hole->second == next->first) {
      hole->second += next->second;
      holes.erase(next);
    }
    if (hole == holes.begin()) return;
    const auto before = std::prev(hole);
    if (before->first + before->second != hole->first) return;
    before->second += hole->second;
    holes.erase(hole);
  }

  std::mutex mutex_;
  Regions regions_;
  Blocks taken_;
  PoolUse use_{0, 0};
};

Pool& pool() {
  static Pool* one = new Pool;  // never deleted: tensors may outlive every static
  return *one;
}

}  // namespace

void* take_block(int64_t bytes) { return pool().take(bytes); }
void give_block(void* block) { pool().give(static_cast<char*>(block)); }
int64_t trim_pool() { return pool().trim(); }
PoolUse pool_use() { return pool().use(); }

}  // namespace zo::cpu
