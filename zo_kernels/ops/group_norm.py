# SPDX-License-Identifier: Apache-2.0
"""`group_norm`: what comes before and after a GroupNorm, in its passes over the activations."""

from typing import Any

from torch import Tensor

from zo_kernels._registry import define
from zo_kernels.ops import _norm
from zo_kernels.ops._quantized_backend import backends

SCHEMA = f"group_norm{_norm.SCHEMA_ARGUMENTS} -> Tensor"


def group_norm_ref(x: Tensor, *args: Any) -> Tensor:
    y = _norm.normalized(x, *args).to(x.dtype)
    return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _fake(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    _norm.check("group_norm", x, groups, weight, bias, eps, shift, activation)
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


_op = define(
    SCHEMA,
    reference=group_norm_ref,
    fake=_fake,
    device_of=lambda x, *_: x.device,
    examples=_norm.examples,
    backends=backends("group_norm", _norm.supports),
)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(group_norm(x + shift)), in fp32 inside; source: Wu and He, arXiv 1803.08494.

    Moments are taken around the first pixel of each channel, so that a large mean costs no
    digits. No gradient flows.

    Args:
        x: fp32, bf16, fp16 or fp64 [B, C, H, W]; nothing is rearranged if it is channels_last.
        groups: divides C.
        weight, bias: floating [C]; None is 1 and 0.
        eps: added to the variance.
        shift: floating [B, C], added to all pixels first, such as a time embedding.
        activation: "none", "silu" or "gelu" (by erf).

    Returns:
        [B, C, H, W] in the dtype of x, channels_last.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes or devices don't fit, or a number is out of range.

    Example:
        >>> y = group_norm(x, 32, norm.weight, norm.bias, eps=norm.eps, activation="silu")
    """
    _norm.check("group_norm", x, groups, weight, bias, eps, shift, activation)
    y: Tensor = _op(x, groups, weight, bias, eps, shift, activation)
    return y
