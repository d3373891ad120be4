// SPDX-License-Identifier: Apache-2.0
// The noise contract in C++: twin of zo_kernels/rng.py, which documents it. Constants of all backends.
#pragma once

#include <cstdint>

namespace zo {

enum class Kind { normal, rademacher };

// Elements of one Philox block, whose index is one 32-bit word of the counter.
constexpr int64_t elements_per_block(Kind kind) { return kind == Kind::normal ? 4 : 128; }

struct Philox {
  static constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  static constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  static constexpr int kRounds = 10;
};

struct BoxMuller {
  // log(1 + t) = t - t^2/2 + t^3 Q(t)
  static constexpr float kLog[8] = {0.333333317f, -0.250008211f, 0.200012267f,  -0.166233565f,
                                    0.142017625f, -0.131601951f, 0.127615503f, -0.0763442984f};
  static constexpr float kLn2 = 0.693147181f;
  // sin(x) = x + x^3 S(x^2), cos(x) = 1 - x^2/2 + x^4 C(x^2)
  static constexpr float kSin[3] = {-0.166666647f, 0.00833274901f, -0.000195880101f};
  static constexpr float kCos[3] = {0.0416666646f, -0.00138883016f, 2.45477756e-05f};
  static constexpr float kAngle = 1.46291807926715968e-09f;  // 2 pi / 2^32
  static constexpr int32_t kSqrtHalfBits = 0x3F3504F3;
};

struct Words {
  uint32_t w[4];
};

// Ten rounds of Philox4x32 on one counter (Salmon et al., SC'11).
inline Words philox4x32(Words c, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < Philox::kRounds; ++round) {
    const uint64_t p0 = uint64_t{Philox::kMultiplier0} * c.w[0];
    const uint64_t p1 = uint64_t{Philox::kMultiplier1} * c.w[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.w[1] ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.w[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += Philox::kWeyl0;
    k1 += Philox::kWeyl1;
  }
  return c;
}

}  // namespace zo
