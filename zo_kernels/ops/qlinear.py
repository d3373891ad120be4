# SPDX-License-Identifier: Apache-2.0
"""`qlinear`: y[m, n] = scale[n] * sum_k x[m, k] * (qweight[n, k] - zero_point[n]) + bias[n].

Reference: optimum-quanto's weight-only int8 linear (the stack of ZOODiP, arXiv 2503.14868), with
the scale behind the product.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_kernels._registry import Example, define
from zo_kernels.ops._weight_only import (
    FLOATS,
    check_quantized,
    codes,
    compute_dtype,
    epilogue,
    outside_autocast,
    refuse_scale_grad,
)

SCHEMA = (
    "qlinear(Tensor x, Tensor qweight, Tensor scale, Tensor? zero_point=None, "
    "Tensor? bias=None) -> Tensor"
)


def _check(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    check_quantized("qlinear", x, qweight, scale, zero_point, bias, ("N", "K"))
    if x.dim() == 0 or x.shape[-1] != qweight.shape[1]:
        raise ValueError(
            f"qlinear: x must be [..., {qweight.shape[1]}] for a weight of "
            f"{tuple(qweight.shape)}, got shape {tuple(x.shape)}; check which layer it feeds"
        )


@outside_autocast
def qlinear_ref(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    dtype = compute_dtype(x)
    y = F.linear(x.to(dtype), codes(qweight, zero_point, dtype))  # [..., N]
    return epilogue(y, scale, bias).to(x.dtype)


def _fake(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    _check(x, qweight, scale, zero_point, bias)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, zero_point, bias = inputs
    refuse_scale_grad("qlinear", scale)
    ctx.bias_needs_grad = bias is not None and bias.requires_grad
    ctx.save_for_backward(qweight, scale, zero_point)
    ctx.dtype = compute_dtype(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the codes are frozen."""
    qweight, scale, zero_point = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        scaled = (grad * scale).to(ctx.dtype)  # [..., N]
        grad_x = (scaled @ codes(qweight, zero_point, ctx.dtype)).to(grad.dtype)
    if ctx.bias_needs_grad:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias


def _device_of(x: Tensor, *_: object) -> torch.device:
    return x.device


def _examples() -> Iterator[Example]:
    codes = torch.arange(7 * 63).remainder(255).sub(127).to(torch.int8).view(7, 63)
    scale = torch.linspace(1e-3, 2e-3, 7)
    zero_point = torch.arange(-3, 4, dtype=torch.int8)
    for dtype in FLOATS:
        x = torch.linspace(-1, 1, 5 * 63).to(dtype).view(5, 63)
        bias = torch.linspace(-1, 1, 7).to(dtype)
        yield x, codes, scale, None, bias
        yield x.view(5, 1, 63), codes, scale, zero_point, None
    yield torch.ones(63, 5).t(), codes, scale, None, None
    yield torch.ones(0, 63), codes, scale, zero_point, torch.ones(7)
    yield torch.ones(5, 63, requires_grad=True), codes, scale, zero_point, torch.ones(7)


_op = define(
    SCHEMA,
    reference=qlinear_ref,
    fake=_fake,
    device_of=_device_of,
    examples=_examples,
    backward=_backward,
    setup_context=_setup_context,
)


def qlinear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A linear layer whose weight is stored as integers:
    y[m, n] = scale[n] * sum_k x[m, k] * (qweight[n, k] - zero_point[n]) + bias[n].

    The product runs in the dtype of x (float16 in fp32, where unscaled sums cannot overflow), also
    under autocast. The reference casts the codes for the length of the call; nothing is kept.
    Gradients flow to x and bias; the codes are frozen.

    Args:
        x: fp32, bf16, fp16 or fp64 [..., K].
        qweight: int8 [N, K].
        scale: fp32 [N], the weight's units per code.
        zero_point: int8 [N], the code of weight 0; None is 0.
        bias: floating [N]; None is 0.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes do not fit each other, or the tensors are on several devices.
        NotImplementedError: scale requires a gradient.

    Example:
        >>> codes, scale = zo_kernels.quant.absmax(linear.weight)
        >>> y = qlinear(x, codes, scale, bias=linear.bias)
    """
    _check(x, qweight, scale, zero_point, bias)
    y: Tensor = _op(x, qweight, scale, zero_point, bias)
    return y
