// SPDX-License-Identifier: Apache-2.0
// What each op does to an element; see update.cuh.
#pragma once

#include "cuda/update.cuh"

namespace zo::cuda {

// p <- decay p + sum_j scales[j] z_j. hyper: (decay).
struct AddNoise {
  static constexpr int kStates = 0;
  static constexpr bool kSnapsTerms = true;
  float decay;
  ZO_HOST_DEVICE explicit AddNoise(const Launch& c) : decay(c.hyper[0]) {}
  ZO_HOST_DEVICE bool has(int) const { return false; }
  template <class Snap>
  ZO_HOST_DEVICE float start(float p, Snap snap) const {
    return snap(mul(decay, p));
  }
  template <class Snap>
  ZO_HOST_DEVICE float finish(float total, float, float&, float&, Snap) const {
    return total;
  }
};

// b <- momentum b + g, p <- decay p + step b, or sign(b) for b. hyper: (momentum, step, decay).
struct ZoSgd {
  static constexpr int kStates = 1;
  static constexpr bool kSnapsTerms = false;
  float momentum, step, decay;
  bool sign, buffer;
  ZO_HOST_DEVICE explicit ZoSgd(const Launch& c)
      : momentum(c.hyper[0]), step(c.hyper[1]), decay(c.hyper[2]), sign(c.sign), buffer(c.buffer) {}
  ZO_HOST_DEVICE bool has(int) const { return buffer; }
  template <class Snap>
  ZO_HOST_DEVICE float start(float, Snap) const {
    return 0.0f;
  }
  template <class Snap>
  ZO_HOST_DEVICE float finish(float b, float p, float& kept, float&, Snap snap) const {
    if (buffer) b = kept = add(mul(momentum, kept), b);
    if (sign) b = static_cast<float>(b > 0.0f) - static_cast<float>(b < 0.0f);
    return add(snap(mul(decay, p)), snap(mul(step, b)));
  }
};

// m <- m + rest1 (g - m), v <- beta2 v + rest2 g^2, p <- decay p + m / (sqrt(v inverse_bias2) + adam_eps) step.
// hyper: (rest1, beta2, rest2, inverse_bias2, adam_eps, step, decay).
struct ZoAdam {
  static constexpr int kStates = 2;
  static constexpr bool kSnapsTerms = false;
  float rest1, beta2, rest2, inverse_bias2, adam_eps, step, decay;
  ZO_HOST_DEVICE explicit ZoAdam(const Launch& c)
      : rest1(c.hyper[0]),
        beta2(c.hyper[1]),
        rest2(c.hyper[2]),
        inverse_bias2(c.hyper[3]),
        adam_eps(c.hyper[4]),
        step(c.hyper[5]),
        decay(c.hyper[6]) {}
  ZO_HOST_DEVICE bool has(int) const { return true; }
  template <class Snap>
  ZO_HOST_DEVICE float start(float, Snap) const {
    return 0.0f;
  }
  template <class Snap>
  ZO_HOST_DEVICE float finish(float g, float p, float& m, float& v, Snap snap) const {
    m = add(m, mul(rest1, sub(g, m)));
    v = add(mul(beta2, v), mul(rest2, mul(g, g)));
    const float root = add(sqrt(mul(v, inverse_bias2)), adam_eps);
    return add(snap(mul(decay, p)), snap(mul(div(m, root), step)));
  }
};

}  // namespace zo::cuda
