# SPDX-License-Identifier: Apache-2.0
"""`geglu_quantize`: the gate of a feed-forward layer straight to the int8 of its second half.

GEGLU (Shazeer 2020, arXiv 2002.05202) has no parameters of its own; its floats, the widest of a
transformer, are never written.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_kernels._registry import Example, define
from zo_kernels.ops._quantized import FLOATS, names, refusal
from zo_kernels.ops._quantized_backend import backends, supports_rows
from zo_kernels.ops.quantize_rows import quantize_rows_ref

SCHEMA = "geglu_quantize(Tensor x) -> (Tensor, Tensor)"


def _check(x: Tensor) -> None:
    op = "geglu_quantize"
    if x.dtype not in FLOATS:
        raise TypeError(refusal(op, "x", names(FLOATS), x.dtype, "cast it"))
    if x.dim() < 1 or x.shape[-1] < 2 or x.shape[-1] % 2:
        got, advice = f"shape {list(x.shape)}", "values and gates come side by side"
        raise ValueError(refusal(op, "x", "[..., 2 K] with K >= 1", got, advice))


def geglu_quantize_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    value, gate = x.to(wide).chunk(2, -1)
    return quantize_rows_ref((value * F.gelu(gate)).contiguous())


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    return x.new_empty(shape, dtype=torch.int8), x.new_empty(shape[:-1], dtype=torch.float32)


def _examples() -> Iterator[Example]:
    for dtype in FLOATS:
        x = torch.linspace(-3, 2, 2 * 5 * 38).sin().mul(3).to(dtype).view(2, 5, 38)
        yield (x,)
        yield (x[:, ::2],)
    yield (torch.ones(0, 8),)
    yield (torch.ones(8),)


_op = define(
    SCHEMA,
    reference=geglu_quantize_ref,
    fake=_fake,
    device_of=lambda x: x.device,
    examples=_examples,
    backends=backends("geglu_quantize", supports_rows),
)


def geglu_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows(value * gelu(gate))` with gelu by erf, without the floats between.

    Args:
        x: fp32, bf16, fp16 or fp64 [..., 2 K], any strides: values, then gates.

    Returns:
        codes int8 [..., K], and scale fp32 [...]; see `quantize_rows`. No gradient flows.

    Raises:
        TypeError: x has another dtype.
        ValueError: its last dimension is not even.

    Example:
        >>> codes, scale = geglu_quantize(project_in(x))
        >>> y = qlinear(codes, qweight, weight_scale, x_scale=scale)
    """
    _check(x)
    codes, scale = _op(x)
    return codes, scale
