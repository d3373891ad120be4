// SPDX-License-Identifier: Apache-2.0
// p <- decay * p + sum_j scales[j] * z_j. hyper: (decay).
namespace zo::cpu {
namespace {

struct AddNoise {
  static constexpr bool kSnapsTerms = true;
  F decay;
  explicit AddNoise(const Call& c) : decay(V::set(c.hyper[0])) {}
  template <class Snap>
  F start(F p, Snap snap) const {
    return snap(V::mul(decay, p));
  }
  template <class Snap>
  F finish(F total, F, float* const (&)[2], int64_t, Snap) const {
    return total;
  }
};

}  // namespace
}  // namespace zo::cpu
