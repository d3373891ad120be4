// SPDX-License-Identifier: Apache-2.0
// All kernels of one instruction set, behind its `V` (see noise.inl) and `D` (see product.inl).

#include "cpu/product.inl"
#include "cpu/group_norm.inl"
#include "cpu/attention.inl"
#include "cpu/row_norm.inl"
#include "cpu/kernels.h"

namespace zo::cpu {
namespace {

constexpr Kernels kAll{multiply_here,
                       largest_here,
                       quantize_here,
                       add_up_here,
                       widen_here,
                       moments_here,
                       normalize_here,
                       largest_normalized_here,
                       quantize_normalized_here,
                       quantize_layer_norm_here,
                       quantize_geglu_here,
                       attend_here};

}  // namespace
}  // namespace zo::cpu
