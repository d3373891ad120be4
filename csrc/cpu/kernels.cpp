// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernels.h"

#include "cpu/isa.h"

namespace zo::cpu {

const Kernels& kernels() {
#if defined(ZO_X86)
  // AVX-512 of the first generation has no dot product of bytes.
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  if (isa() == Isa::avx512 && has_vnni) return kernels_avx512;
  if (isa() != Isa::scalar) return kernels_avx2;
#endif
  return kernels_scalar;
}

const Kernels& kernels_for(const Product& p) {
#if defined(ZO_X86)
  // The dot product of AVX2 negates activations.
  if (&kernels() == &kernels_avx2 && p.has_minus_128) return kernels_scalar;
#endif
  return kernels();
}

}  // namespace zo::cpu
