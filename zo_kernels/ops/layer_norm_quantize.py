# SPDX-License-Identifier: Apache-2.0
"""`layer_norm_quantize`: LayerNorm straight to the int8 that a linear layer multiplies.

Beside `layer_norm` and `quantize_rows` in turn, each row is read once, and normalized floats are
never written.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from zo_kernels._registry import Example, define
from zo_kernels.ops._quantized import FLOATS, check_tensor, names, refusal
from zo_kernels.ops._quantized_backend import backends, supports_rows
from zo_kernels.ops.quantize_rows import quantize_rows_ref

SCHEMA = (
    "layer_norm_quantize(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) "
    "-> (Tensor, Tensor)"
)


def _check(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> None:
    op = "layer_norm_quantize"
    if x.dtype not in FLOATS:
        raise TypeError(refusal(op, "x", names(FLOATS), x.dtype, "cast it"))
    if x.dim() < 1 or x.shape[-1] < 1:
        got, advice = f"shape {list(x.shape)}", "check which layer it feeds"
        raise ValueError(refusal(op, "x", "[..., K] with K >= 1", got, advice))
    if not eps >= 0:
        raise ValueError(refusal(op, "eps", "at least 0", eps, "copy it from the float layer"))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            advice = "check which layer x feeds"
            check_tensor(op, name, value, FLOATS, x.shape[-1:], x.device, advice)


def layer_norm_quantize_ref(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    y = torch.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    return quantize_rows_ref(y.contiguous())


def _fake(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias, eps)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale


def _examples() -> Iterator[Example]:
    for dtype in FLOATS:
        x = torch.linspace(-3, 2, 2 * 5 * 37).sin().to(dtype).view(2, 5, 37)
        yield x, torch.linspace(0.5, 2, 37).to(dtype), torch.linspace(-1, 1, 37).to(dtype), 1e-5
        yield x[:, ::2], torch.linspace(0.5, 2, 37).to(dtype), None, 1e-6
    yield torch.ones(0, 8), None, None, 1e-5
    yield torch.ones(8), None, torch.linspace(-1, 1, 8), 0.5


_op = define(
    SCHEMA,
    reference=layer_norm_quantize_ref,
    fake=_fake,
    device_of=lambda x, *_: x.device,
    examples=_examples,
    backends=backends("layer_norm_quantize", supports_rows),
)


def layer_norm_quantize(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`quantize_rows(layer_norm(x, ...))` over the last dimension, without the floats between.

    Args:
        x: fp32, bf16, fp16 or fp64 [..., K], any strides.
        weight, bias: floating [K]; None is 1 and 0.
        eps: added to the variance.

    Returns:
        codes int8 [..., K], and scale fp32 [...]; see `quantize_rows`. No gradient flows.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes do not fit, or eps is negative.

    Example:
        >>> codes, scale = layer_norm_quantize(x, norm.weight, norm.bias, eps=norm.eps)
        >>> y = qlinear(codes, qweight, weight_scale, x_scale=scale)
    """
    _check(x, weight, bias, eps)
    codes, scale = _op(x, weight, bias, eps)
    return codes, scale
