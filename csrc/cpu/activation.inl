// SPDX-License-Identifier: Apache-2.0
// SiLU and GELU on vectors: within 4 ulp of the range where fp32 has 24 bits, the same bits on every instruction set.

namespace zo::cpu {
namespace {

template <int N>
inline F polynomial(F x, const float (&c)[N]) {  // constant term first
  F y = V::set(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) y = V::add(V::mul(y, x), V::set(c[i]));
  return y;
}

// exp(x) for x in [-87, 88], relative error 2e-7 (Cody and Waite's reduction, a polynomial of degree 6).
inline F exponential(F x) {
  const U n = D::nearest(V::mul(x, V::set(1.44269504f)));
  const F whole = V::from_i32(n);
  const F high = V::add(x, V::mul(whole, V::set(-0.693145752f)));  // 2^-15 ln 2 has 15 bits: exact product
  const F r = V::add(high, V::mul(whole, V::set(-1.42860677e-6f)));
  static constexpr float kTaylor[7] = {1.0f,          1.0f,          0.5f,          0.166666672f,
                                       0.0416666679f, 0.0083333338f, 0.00138888892f};
  const F power = V::floats(V::template shift_left<23>(V::add(n, V::set(127u))));
  return V::mul(polynomial(r, kTaylor), power);
}

inline F silu(F x) {  // x / (1 + exp(-x)); NaN stays in the numerator
  const F e = exponential(D::clamp(V::mul(x, V::set(-1.0f)), -87.0f, 88.0f));
  return V::div(x, V::add(e, V::set(1.0f)));
}

// x/2 (1 + erf(x / sqrt(2))), erf as a rational function on [-4, 4], beyond which fp32 has it at 1.
inline F gelu(F x) {
  const F t = D::clamp(V::mul(x, V::set(0.707106769f)), -4.0f, 4.0f);
  const F square = V::mul(t, t);
  static constexpr float kTop[7] = {-1.60960333262415e-02f, -2.95459980854025e-03f, -7.34990630326855e-04f,
                                    -5.69250639462346e-05f, -2.10102402082508e-06f, 2.77068142495902e-08f,
                                    -2.72614225801306e-10f};
  static constexpr float kBottom[5] = {-1.42647390514189e-02f, -7.37332916720468e-03f, -1.68282697438203e-03f,
                                       -2.13374055278905e-04f, -1.45660718464996e-05f};
  const F erf = V::div(V::mul(t, polynomial(square, kTop)), polynomial(square, kBottom));
  return V::mul(V::mul(x, V::set(0.5f)), V::add(erf, V::set(1.0f)));
}

inline F activate(Activation activation, F x) { return activation == Activation::silu ? silu(x) : gelu(x); }

}  // namespace
}  // namespace zo::cpu
