// SPDX-License-Identifier: Apache-2.0
// b <- momentum * b + g, p <- decay * p + step * b, or sign(b) for b. hyper: (momentum, step, decay);
// state: (b), or none for b = g.
namespace zo::cpu {
namespace {

struct ZoSgd {
  static constexpr bool kSnapsTerms = false;
  F momentum, step, decay;
  bool sign;
  explicit ZoSgd(const Call& c)
      : momentum(V::set(c.hyper[0])), step(V::set(c.hyper[1])), decay(V::set(c.hyper[2])), sign(c.sign) {}
  template <class Snap>
  F start(F, Snap) const {
    return V::set(0.0f);
  }
  template <class Snap>
  F finish(F b, F p, float* const (&state)[2], int64_t at, Snap snap) const {
    if (state[0] != nullptr) {
      b = V::add(V::mul(momentum, V::load(state[0] + at)), b);
      V::store(state[0] + at, b);
    }
    if (sign) b = V::sign_of(b);
    return V::add(snap(V::mul(decay, p)), snap(V::mul(step, b)));
  }
};

}  // namespace
}  // namespace zo::cpu
