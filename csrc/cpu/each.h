// SPDX-License-Identifier: Apache-2.0
// Loops whose counters the compiler knows. Those over rows and vectors of a register tile must be such: a loop that
// gcc unrolls itself is unrolled too late to see that no register is missing, and parts of the tile lie in memory.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#define ZO_INLINE __attribute__((always_inline))

namespace zo::cpu {

template <class Run, int... I>
ZO_INLINE inline void each_of(const Run& run, std::integer_sequence<int, I...>) {
  (run(std::integral_constant<int, I>()), ...);
}

// run(0), ..., run(N - 1).
template <int N, class Run>
ZO_INLINE inline void each(const Run& run) {
  each_of(run, std::make_integer_sequence<int, N>());
}

// run(0), ..., run(count - 1), of which some share a test for the end.
template <class Run>
ZO_INLINE inline void each_step(int64_t count, const Run& run) {
  constexpr int kAtOnce = 4;
  const auto one = [&](int64_t i) ZO_INLINE {
    run(i);
    asm volatile("" ::: "memory");  // nothing is loaded ahead: there is no register to keep it in
  };
  int64_t i = 0;
#pragma GCC unroll 1
  for (; i + kAtOnce <= count; i += kAtOnce) each<kAtOnce>([&](auto j) ZO_INLINE { one(i + j); });
#pragma GCC unroll 1
  for (; i < count; ++i) one(i);
}

}  // namespace zo::cpu
