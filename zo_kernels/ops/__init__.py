# SPDX-License-Identifier: Apache-2.0
"""The ops, one file each: schema, check, reference, fake kernel, public wrapper, examples."""

from zo_kernels._native import empty_cache
from zo_kernels._registry import use_backend
from zo_kernels.ops.add_noise import add_noise_
from zo_kernels.ops.geglu_quantize import geglu_quantize
from zo_kernels.ops.group_norm import group_norm
from zo_kernels.ops.group_norm_quantize import group_norm_quantize
from zo_kernels.ops.layer_norm_quantize import layer_norm_quantize
from zo_kernels.ops.qattention import qattention
from zo_kernels.ops.qconv2d import qconv2d
from zo_kernels.ops.qlinear import qlinear
from zo_kernels.ops.quantize_rows import quantize_rows
from zo_kernels.ops.zo_adam import zo_adam_
from zo_kernels.ops.zo_sgd import zo_sgd_

__all__ = [
    "add_noise_",
    "empty_cache",
    "geglu_quantize",
    "group_norm",
    "group_norm_quantize",
    "layer_norm_quantize",
    "qattention",
    "qconv2d",
    "qlinear",
    "quantize_rows",
    "use_backend",
    "zo_adam_",
    "zo_sgd_",
]
