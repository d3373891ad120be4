// SPDX-License-Identifier: Apache-2.0
// m <- m + rest1 * (g - m), v <- beta2 * v + rest2 * g^2, p <- decay * p + m / (sqrt(v * inverse_bias2) +
// adam_eps) * step. hyper: (rest1, beta2, rest2, inverse_bias2, adam_eps, step, decay); state: (m, v).
namespace zo::cpu {
namespace {

struct ZoAdam {
  static constexpr bool kSnapsTerms = false;
  F rest1, beta2, rest2, inverse_bias2, adam_eps, step, decay;
  explicit ZoAdam(const Call& c)
      : rest1(V::set(c.hyper[0])),
        beta2(V::set(c.hyper[1])),
        rest2(V::set(c.hyper[2])),
        inverse_bias2(V::set(c.hyper[3])),
        adam_eps(V::set(c.hyper[4])),
        step(V::set(c.hyper[5])),
        decay(V::set(c.hyper[6])) {}
  template <class Snap>
  F start(F, Snap) const {
    return V::set(0.0f);
  }
  template <class Snap>
  F finish(F g, F p, float* const (&state)[2], int64_t at, Snap snap) const {
    F m = V::load(state[0] + at), v = V::load(state[1] + at);
    m = V::add(m, V::mul(rest1, V::sub(g, m)));
    v = V::add(V::mul(beta2, v), V::mul(rest2, V::mul(g, g)));
    V::store(state[0] + at, m);
    V::store(state[1] + at, v);
    const F root = V::add(V::sqrt(V::mul(v, inverse_bias2)), adam_eps);
    return V::add(snap(V::mul(decay, p)), snap(V::mul(V::div(m, root), step)));
  }
};

}  // namespace
}  // namespace zo::cpu
