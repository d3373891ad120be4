# SPDX-License-Identifier: Apache-2.0
"""`qconv2d`: y[b, n] = scale[n] * sum_c x[b, c] (*) (qweight[n, c] - zero_point[n]) + bias[n],
where (*) is `torch.nn.functional.conv2d`'s cross-correlation with zero padding.

Reference: optimum-quanto's weight-only int8 convolution (the stack of ZOODiP, arXiv 2503.14868),
with the scale behind the product.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

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
    "qconv2d(Tensor x, Tensor qweight, Tensor scale, Tensor? zero_point=None, "
    "Tensor? bias=None, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1) "
    "-> Tensor"
)


def _check(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> None:
    check_quantized("qconv2d", x, qweight, scale, zero_point, bias, ("N", "C / groups", "kh", "kw"))
    for name, pair, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if min(pair) < least:
            raise ValueError(
                f"qconv2d: {name} must be at least {least}, got {tuple(pair)}; "
                "copy it from the float layer"
            )
    if groups < 1 or qweight.shape[0] % groups:
        raise ValueError(
            f"qconv2d: groups must be positive and divide the {qweight.shape[0]} output channels, "
            f"got {groups}; copy it from the float layer"
        )
    channels = qweight.shape[1] * groups
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"qconv2d: x must be [B, {channels}, H, W] for a weight of {tuple(qweight.shape)} and "
            f"{groups} groups, got shape {tuple(x.shape)}; check which layer it feeds"
        )
    for axis, size, pad, gap, kernel in zip(
        ("high", "wide"), x.shape[2:], padding, dilation, qweight.shape[2:], strict=True
    ):
        span = gap * (kernel - 1) + 1
        if size + 2 * pad < span:
            raise ValueError(
                f"qconv2d: x must be at least {span - 2 * pad} {axis} for this kernel, got {size}; "
                "pad it or use a larger picture"
            )


@outside_autocast
def qconv2d_ref(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    dtype = compute_dtype(x)
    weight = codes(qweight, zero_point, dtype)
    y = F.conv2d(x.to(dtype), weight, None, stride, padding, dilation, groups)  # [B, N, H', W']
    return epilogue(y, _column(scale), None if bias is None else _column(bias)).to(x.dtype)


def _column(vector: Tensor) -> Tensor:
    """[N] -> [N, 1, 1], to meet [B, N, H', W']."""
    return vector.view(-1, 1, 1)


def _fake(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    _check(x, qweight, scale, zero_point, bias, stride, padding, dilation, groups)
    # Torch's own fake convolution knows when the output is channels_last.
    return F.conv2d(x, qweight.to(x.dtype), None, stride, padding, dilation, groups)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scale, zero_point, bias, *ctx.geometry = inputs
    refuse_scale_grad("qconv2d", scale)
    ctx.bias_needs_grad = bias is not None and bias.requires_grad
    ctx.save_for_backward(qweight, scale, zero_point)
    ctx.shape, ctx.dtype = x.shape, compute_dtype(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the codes are frozen."""
    qweight, scale, zero_point = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        scaled = (grad * _column(scale)).to(ctx.dtype)  # [B, N, H', W']
        weight = codes(qweight, zero_point, ctx.dtype)
        grad_x = conv2d_input(ctx.shape, weight, scaled, *ctx.geometry)
        grad_x = grad_x.to(grad.dtype)
    if ctx.bias_needs_grad:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, None, None, None, grad_bias, None, None, None, None


def _device_of(x: Tensor, *_: object) -> torch.device:
    return x.device


def _examples() -> Iterator[Example]:
    codes = torch.arange(8 * 6 * 9).remainder(255).sub(127).to(torch.int8).view(8, 6, 3, 3)
    scale = torch.linspace(1e-3, 2e-3, 8)
    zero_point = torch.arange(-4, 4, dtype=torch.int8)
    plain = ([1, 1], [0, 0], [1, 1], 1)
    padded = ([2, 2], [1, 1], [1, 1], 1)
    for dtype in FLOATS:
        x = torch.linspace(-1, 1, 2 * 6 * 7 * 9).to(dtype).view(2, 6, 7, 9)
        bias = torch.linspace(-1, 1, 8).to(dtype)
        yield x, codes, scale, None, bias, *plain
        yield x, codes, scale, zero_point, None, *padded
    x, last = torch.ones(2, 6, 7, 9), torch.channels_last
    yield x, codes.to(memory_format=last), scale, None, None, *padded
    yield x.to(memory_format=last), codes.to(memory_format=last), scale, None, None, *plain
    yield x, codes[:, :3], scale, None, None, [1, 2], [2, 1], [2, 1], 2
    yield x[:0], codes, scale, zero_point, torch.ones(8), *plain
    yield x.clone().requires_grad_(), codes, scale, zero_point, torch.ones(8), *padded


_op = define(
    SCHEMA,
    reference=qconv2d_ref,
    fake=_fake,
    device_of=_device_of,
    examples=_examples,
    backward=_backward,
    setup_context=_setup_context,
)


def qconv2d(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A 2-d convolution whose weight is stored as integers:
    y[b, n] = scale[n] * sum_c x[b, c] (*) (qweight[n, c] - zero_point[n]) + bias[n].

    The product runs in the dtype of x (float16 in fp32, where unscaled sums cannot overflow), also
    under autocast. The reference casts the codes for the length of the call; nothing is kept.
    Gradients flow to x and bias; the codes are frozen. Where x and qweight are both channels_last
    nothing is rearranged; the output is channels_last if one of them is.

    Args:
        x: fp32, bf16, fp16 or fp64 [B, C, H, W].
        qweight: int8 [N, C / groups, kh, kw].
        scale: fp32 [N], the weight's units per code.
        zero_point: int8 [N], the code of weight 0; None is 0.
        bias: floating [N]; None is 0.
        stride, padding, dilation: pixels, one int or (vertical, horizontal); padding with zeros.
        groups: number of independent groups of channels.

    Returns:
        [B, N, H', W'] in the dtype of x.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes do not fit each other, a number is out of range, or the tensors are on
            several devices.
        NotImplementedError: scale requires a gradient.

    Example:
        >>> codes, scale = zo_kernels.quant.absmax(conv.weight)
        >>> y = qconv2d(x, codes, scale, bias=conv.bias, padding=conv.padding)
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    _check(x, qweight, scale, zero_point, bias, stride, padding, dilation, groups)
    y: Tensor = _op(x, qweight, scale, zero_point, bias, stride, padding, dilation, groups)
    return y


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value
