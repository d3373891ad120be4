# SPDX-License-Identifier: Apache-2.0
"""`group_norm_quantize`: GroupNorm straight to the int8 that a convolution multiplies.

Beside `group_norm` and `quantize_rows` in turn it reads the activations three times instead of
five, and never writes normalized floats.
"""

from typing import Any

import torch
from torch import Tensor

from zo_kernels._registry import define
from zo_kernels.ops import _norm
from zo_kernels.ops._quantized_backend import backends
from zo_kernels.ops.quantize_rows import quantize_rows_ref

SCHEMA = f"group_norm_quantize{_norm.SCHEMA_ARGUMENTS} -> (Tensor, Tensor)"


def group_norm_quantize_ref(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return quantize_rows_ref(_norm.normalized(x, *args), per_sample=True)


def _fake(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    _norm.check("group_norm_quantize", x, groups, weight, bias, eps, shift, activation)
    batch, channels, height, width = x.shape
    codes = x.new_empty((batch, height, width, channels), dtype=torch.int8)
    return codes.permute(0, 3, 1, 2), x.new_empty(batch, dtype=torch.float32)


_op = define(
    SCHEMA,
    reference=group_norm_quantize_ref,
    fake=_fake,
    device_of=lambda x, *_: x.device,
    examples=_norm.examples,
    backends=backends("group_norm_quantize", _norm.supports),
)


def group_norm_quantize(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """`quantize_rows(group_norm(x, ...), per_sample=True)`, without the floats between.

    Arguments and errors are those of `group_norm`. No gradient flows.

    Returns:
        codes int8 [B, C, H, W], channels_last; and scale fp32 [B].

    Example:
        >>> codes, scale = group_norm_quantize(x, 32, norm.weight, norm.bias, activation="silu")
        >>> y = qconv2d(codes, qweight, weight_scale, kernel_size=3, padding=1, x_scale=scale)
    """
    _norm.check("group_norm_quantize", x, groups, weight, bias, eps, shift, activation)
    codes, scale = _op(x, groups, weight, bias, eps, shift, activation)
    return codes, scale
