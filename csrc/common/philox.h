// SPDX-License-Identifier: Apache-2.0
// The noise contract in C++: twin of zo_kernels/rng.py, which documents it. Constants of all backends.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ZO_HOST_DEVICE __host__ __device__
#else
#define ZO_HOST_DEVICE
#endif

namespace zo {

enum class Kind { normal, rademacher };

// Elements that a whole number of Philox blocks fills: 16 blocks side by side, or one.
constexpr int64_t group_of(Kind kind) { return kind == Kind::normal ? 64 : 128; }
// A stream ends where the 32-bit block counter does.
constexpr int64_t max_elements(Kind kind) { return int64_t{1} << (kind == Kind::normal ? 34 : 39); }

struct Philox {
  static constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  static constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  static constexpr int kRounds = 10;
};

struct BoxMuller {
  // -2 log(1 + t) / t
  static constexpr float kLog[8] = {-1.9999998807907104f,  1.0000072717666626f,  -0.6667011976242065f,
                                    0.4993981719017029f,   -0.39800330996513367f, 0.34501656889915466f,
                                    -0.32445159554481506f, 0.20213796198368073f};
  static constexpr float kMinus2Ln2 = -1.3862943649291992f;
  // sin(pi/4 f) / f and cos(pi/4 f) in powers of f^2
  static constexpr float kSin[4] = {0.7853981852531433f, -0.08074543625116348f, 0.00249000103212893f,
                                    -3.59504520019982e-05f};
  static constexpr float kCos[4] = {1.0f, -0.3084242641925812f, 0.015849914401769638f,
                                    -0.0003188805130776018f};
  static constexpr uint32_t kSqrtHalfBits = 0x3F3504F3, kExponent32 = 32u << 23;
};

struct Words {
  uint32_t w[4];
};

// Ten rounds of Philox4x32 on one counter (Salmon et al., SC'11). Static, because each instruction set must
// have a copy of its own: the linker would keep one for all, maybe the one that this CPU cannot run.
ZO_HOST_DEVICE static inline Words philox4x32(Words c, uint64_t key) {
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
