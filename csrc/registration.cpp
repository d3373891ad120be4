// SPDX-License-Identifier: Apache-2.0
// The schemas are owned by zo_kernels/ops; here are the CPU kernels behind them, against libtorch's stable
// ABI, so that one build serves every torch >= 2.11.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(zo_kernels, CPU, m) {
  m.impl("add_noise_", TORCH_BOX(&zo::cpu::add_noise_));
  m.impl("geglu_quantize", TORCH_BOX(&zo::cpu::geglu_quantize));
  m.impl("group_norm", TORCH_BOX(&zo::cpu::group_norm));
  m.impl("group_norm_quantize", TORCH_BOX(&zo::cpu::group_norm_quantize));
  m.impl("layer_norm_quantize", TORCH_BOX(&zo::cpu::layer_norm_quantize));
  m.impl("qattention", TORCH_BOX(&zo::cpu::qattention));
  m.impl("qconv2d", TORCH_BOX(&zo::cpu::qconv2d));
  m.impl("qlinear", TORCH_BOX(&zo::cpu::qlinear));
  m.impl("quantize_rows", TORCH_BOX(&zo::cpu::quantize_rows));
  m.impl("zo_adam_", TORCH_BOX(&zo::cpu::zo_adam_));
  m.impl("zo_sgd_", TORCH_BOX(&zo::cpu::zo_sgd_));
}
