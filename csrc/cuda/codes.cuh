// SPDX-License-Identifier: Apache-2.0
// Codes of a packed weight as pairs of fp16 or bf16 in registers, in few instructions and exactly: q - zero is a whole
// number of at most 255.
//
//   bits | dtype | made by                              | holds          | then added
//      4 | fp16  | nibble xor 0x6400                    | 1024 + u       | -(1032 + zero)
//      4 | bf16  | nibble xor 0x4300, where zero <= 0   | 128 + u        | -(136 + zero)
//      4 | bf16  | nibble xor 0xC30F, where zero > 0    | u - 143        | 135 - zero
//      8 | fp16  | byte below 0x64                      | 1024 + u       | -(1152 + zero)
//      8 | bf16  | byte below 0x4B0000, an fp32         | 2^23 + u       | -(2^23 + 128 + zero), upper halves
//
// u is the stored code, q + 8 or q + 128. bf16 has two ways because 136 + zero need not be one beyond 256. `kNone` is
// what `zero` gives for 0: the GPU converts numbers slowly, and most weights have no zero points.
#pragma once

#include <type_traits>

#include "cuda/scalar.h"

namespace zo::cuda {

// Bytes of {a, b}, numbered from 0, that the nibbles of `which` name, lowest first.
ZO_HOST_DEVICE inline uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, which);
#else
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t all = 0;
  for (int i = 0; i < 4; ++i) all |= (static_cast<uint32_t>(bytes >> 8 * (which >> 4 * i & 7)) & 0xFF) << 8 * i;
  return all;
#endif
}

template <class D>
ZO_HOST_DEVICE inline uint32_t add_pairs(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t sum;
  if constexpr (std::is_same_v<D, F16>) {
    asm("add.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  } else {  // sm_80 adds bf16 by fma alone
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80), "r"(b));
  }
  return sum;
#else
  uint32_t sum = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto x = static_cast<uint16_t>(a >> i), y = static_cast<uint16_t>(b >> i);
    sum |= uint32_t{D::nearest(D::load(x) + D::load(y))} << i;
  }
  return sum;
#endif
}

template <class D>
ZO_HOST_DEVICE inline uint32_t both(int value) {
  return D::nearest(from_i32(value)) * 0x10001u;
}

// What turns the codes of a row and group into numbers.
struct Zero {
  uint32_t base, offset;
};

template <int kBits, class D>
struct Codes;

template <class D>
struct Codes<4, D> {
  static constexpr int kWords = 1;  // that hold 8 channels
  static constexpr Zero kNone = std::is_same_v<D, F16> ? Zero{0x64006400, 0xE408E408} : Zero{0x43004300, 0xC308C308};
  ZO_HOST_DEVICE static Zero zero(int zero) {
    if constexpr (std::is_same_v<D, F16>) return {0x64006400, both<D>(-1032 - zero)};
    return zero > 0 ? Zero{0xC30FC30F, both<D>(135 - zero)} : Zero{0x43004300, both<D>(-136 - zero)};
  }
  ZO_HOST_DEVICE static void pairs(uint32_t (&to)[4], const uint32_t (&words)[1], Zero z) {
    constexpr uint32_t kNibbles = 0x000F000F;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t bytes = permute(words[0], 0, i == 0 ? 0x4140 : 0x4342);
      to[i] = add_pairs<D>((bytes & kNibbles) ^ z.base, z.offset);
      to[i + 2] = add_pairs<D>((bytes >> 4 & kNibbles) ^ z.base, z.offset);
    }
  }
};

template <class D>
struct Codes<8, D> {
  static constexpr int kWords = 2;
  static constexpr Zero kNone = std::is_same_v<D, F16> ? Zero{0x64006400, 0xE480E480} : Zero{0x4B000000, 0xCB000080};
  ZO_HOST_DEVICE static Zero zero(int zero) {
    if constexpr (std::is_same_v<D, F16>) return {0x64006400, both<D>(-1152 - zero)};
    return {0x4B000000, bits(from_i32(-8388736 - zero))};
  }
  ZO_HOST_DEVICE static void pairs(uint32_t (&to)[4], const uint32_t (&words)[2], Zero z) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = words[i / 2], first = i % 2 * 2;
      if constexpr (std::is_same_v<D, F16>) {
        to[i] = add_pairs<D>(permute(word, z.base, 0x5150 + 0x0101 * first), z.offset);
      } else {
        const float low = add(floats(permute(word, z.base, 0x7440 + first)), floats(z.offset));
        const float high = add(floats(permute(word, z.base, 0x7441 + first)), floats(z.offset));
        to[i] = permute(bits(low), bits(high), 0x7632);
      }
    }
  }
};

}  // namespace zo::cuda
