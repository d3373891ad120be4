// SPDX-License-Identifier: Apache-2.0
// What a warp does together. On a GPU a thread is one lane of it; host code, for tests, has all 32 and does the same
// lane by lane, so that code over arrays [kLanes] is written once.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/scalar.h"

namespace zo::cuda {

#ifdef __CUDA_ARCH__
constexpr int kLanes = 1;
ZO_HOST_DEVICE inline int lane_of(int) { return static_cast<int>(threadIdx.x % 32); }
#else
constexpr int kLanes = 32;
ZO_HOST_DEVICE inline int lane_of(int i) { return i; }
#endif

struct alignas(16) Words4 {
  uint32_t w[4];
};

// 16 bytes that are needed once: past L1.
ZO_HOST_DEVICE inline Words4 load_once(const Words4* p) {
#ifdef __CUDA_ARCH__
  Words4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p));
  return v;
#else
  return *p;
#endif
}

// 16 bytes that other warps of the block read too.
ZO_HOST_DEVICE inline Words4 load_again(const Words4* p) {
#ifdef __CUDA_ARCH__
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
#else
  return *p;
#endif
}

// d [16, 8] += a [16, 16] b [16, 8] in fp32: mma.m16n8k16 of PTX, with the fragments of its documentation.
// With g = lane / 4, t = lane % 4, a pair i of
//   a: row g + 8 (i % 2), k 2 t + 8 (i / 2);  b: k 2 t + 8 i, column g;  d[i]: row g + 8 (i / 2), column 2 t + i % 2.
template <class D>
ZO_HOST_DEVICE inline void mma(float (&d)[kLanes][4], const uint32_t (&a)[kLanes][4], const uint32_t (&b)[kLanes][2]) {
#ifdef __CUDA_ARCH__
#define ZO_MMA(type)                                                                                            \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                           \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                           \
               : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3])                                     \
               : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(b[0][0]), "r"(b[0][1]))
  if constexpr (std::is_same_v<D, F16>) {
    ZO_MMA("f16");
  } else {
    ZO_MMA("bf16");
  }
#undef ZO_MMA
#else
  const auto half = [](uint32_t pair, int i) { return D::load(static_cast<uint16_t>(pair >> 16 * i)); };
  float left[16][16], right[16][8];
  for (int k = 0; k < 16; ++k) {
    const int t = k % 8 / 2, upper = k / 8;
    for (int i = 0; i < 16; ++i) left[k][i] = half(a[i % 8 * 4 + t][i / 8 + 2 * upper], k % 2);
    for (int i = 0; i < 8; ++i) right[k][i] = half(b[i * 4 + t][upper], k % 2);
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float& sum = d[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2];
      double total = sum;
      for (int k = 0; k < 16; ++k) total += double{left[k][row]} * double{right[k][column]};
      sum = static_cast<float>(total);
    }
  }
#endif
}

}  // namespace zo::cuda
