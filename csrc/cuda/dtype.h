// SPDX-License-Identifier: Apache-2.0
// Dtypes of what the CUDA kernels are given, in the order of DTYPES in zo_kernels/ops/_updates.py.
#pragma once

namespace zo::cuda {

enum class Dtype { f32, bf16, f16 };

}  // namespace zo::cuda
