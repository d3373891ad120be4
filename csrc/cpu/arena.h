// SPDX-License-Identifier: Apache-2.0
// Memory for one call after another: megabytes allocated anew would be faulted in page by page each time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace zo::cpu {

class Arena {
 public:
  void reset() {
    if (blocks_.size() > 1) {  // next time, one block holds it all
      blocks_.clear();
      blocks_.emplace_back(new char[static_cast<size_t>(total_)]);
      capacity_ = total_;
    }
    used_ = 0;
    total_ = capacity_;
  }
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;  // 64 to read past the end
    if (used_ + bytes > capacity_) {
      capacity_ = std::max<int64_t>(bytes, 1 << 16) + 64;
      total_ += capacity_;
      blocks_.emplace_back(new char[static_cast<size_t>(capacity_)]);
      used_ = 0;
    }
    char* base = blocks_.back().get();
    const int64_t shift = (64 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(base + used_) % 64)) % 64;
    used_ += bytes;
    return reinterpret_cast<T*>(base + used_ - bytes + shift);
  }

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
  int64_t used_ = 0, capacity_ = 0, total_ = 0;
};

inline Arena& arena() {
  static thread_local Arena one;
  one.reset();
  return one;
}

}  // namespace zo::cpu
