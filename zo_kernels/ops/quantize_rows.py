# SPDX-License-Identifier: Apache-2.0
"""`quantize_rows`: activations to int8, with one scale for each row or for each picture.

The scale of a row never depends on another row, that of a picture never on another picture: the
members of a batch, such as both sides of a probe, do not meet.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from zo_kernels._registry import Example, define
from zo_kernels.ops._quantized import FLOATS, FP32, check_tensor, names, refusal
from zo_kernels.ops._quantized_backend import backends, supports_quantize_rows

SCHEMA = "quantize_rows(Tensor x, bool per_sample=False, Tensor? in_scale=None) -> (Tensor, Tensor)"
SMALLEST = 2.0**-100  # below it 127 / absmax could overflow


def _check(x: Tensor, per_sample: bool = False, in_scale: Tensor | None = None) -> None:
    op = "quantize_rows"
    if x.dtype not in FLOATS:
        raise TypeError(refusal(op, "x", names(FLOATS), x.dtype, "cast it"))
    ok = x.dim() == 4 if per_sample else x.dim() > 0
    if not ok or not all(x.shape[1:] if per_sample else x.shape[-1:]):
        requirement = "[B, C, H, W]" if per_sample else "[..., K]"
        raise ValueError(
            refusal(
                *(op, "x", f"{requirement} with at least one value for a scale"),
                *(f"shape {list(x.shape)}", "check which layer it feeds"),
            )
        )
    if in_scale is not None:
        channels = x.shape[1 if per_sample else -1]
        advice = "one per input channel"
        check_tensor(op, "in_scale", in_scale, FP32, (channels,), x.device, advice)


def quantize_rows_ref(
    x: Tensor, per_sample: bool = False, in_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x = x.float()
    if per_sample:
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
    if in_scale is not None:
        x = x * in_scale
    absmax = x.abs().amax(dim=(1, 2, 3) if per_sample else -1)
    # Divided by a tensor: for a number torch may multiply by its reciprocal, which rounds twice.
    most = torch.full_like(absmax, 127.0)
    is_small = absmax < SMALLEST
    factor = most / absmax
    factor = factor.masked_fill(is_small | ~absmax.isfinite(), 0.0)
    codes = x * factor.view(-1, 1, 1, 1) if per_sample else x * factor.unsqueeze(-1)
    # Where the factor is 0, what is not finite became nan: code 0 as well.
    codes.round_().clamp_(-127, 127).nan_to_num_(nan=0.0)
    codes = x.new_empty(x.shape, dtype=torch.int8).copy_(codes)
    scale = (absmax / most).masked_fill_(is_small, 0.0)
    scale = scale.masked_fill_(~absmax.isfinite(), float("nan"))
    return codes.permute(0, 3, 1, 2) if per_sample else codes, scale


def _fake(
    x: Tensor, per_sample: bool = False, in_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check(x, per_sample, in_scale)
    if not per_sample:
        codes = x.new_empty(x.shape, dtype=torch.int8)
        return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)
    batch, channels, height, width = x.shape
    codes = x.new_empty((batch, height, width, channels), dtype=torch.int8)
    return codes.permute(0, 3, 1, 2), x.new_empty(batch, dtype=torch.float32)


def _examples() -> Iterator[Example]:
    for dtype in FLOATS:
        x = torch.linspace(-3, 2, 4 * 63).to(dtype)
        yield x.view(4, 63), False, None
        yield x.view(2, 7, 6, 3), True, torch.linspace(0.5, 2, 7)
    x = torch.linspace(-3, 2, 4 * 63)
    yield x.view(2, 2, 63), False, torch.linspace(0.5, 2, 63)
    yield x, False, None
    yield x.view(63, 4).t(), False, None
    yield x.view(2, 6, 7, 3).transpose(1, 2), True, None
    yield torch.ones(0, 5), False, None
    yield torch.ones(0, 5, 2, 2), True, None


_op = define(
    SCHEMA,
    reference=quantize_rows_ref,
    fake=_fake,
    device_of=lambda x, *_: x.device,
    examples=_examples,
    backends=backends("quantize_rows", supports_quantize_rows),
)


def quantize_rows(
    x: Tensor, per_sample: bool = False, in_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round activations to 8-bit codes and a scale: x ~ codes * scale, |error| <= scale / 2.

    In fp32, each step rounded once: x * in_scale, absmax = max |x|, scale = absmax / 127,
    codes = round(x * (127 / absmax)), ties to even, within -127 to 127. The bits are the same on
    every backend. A row below 2^-100 gets scale 0 and codes 0. A row that holds NaN or infinity
    gets scale NaN and codes 0: what is computed from it is NaN, and no wrong number.

    Args:
        x: fp32, bf16, fp16 or fp64 [..., K], any strides; or [B, C, H, W] with per_sample.
        per_sample: one scale for each x[b], else one for each row x[..., :].
        in_scale: fp32 [K], or [C] with per_sample: factors of the input channels, applied first.

    Returns:
        codes int8 in the shape of x, contiguous or, with per_sample, channels_last; and
        scale fp32 [...], or [B].

    Raises:
        TypeError: x or in_scale has another dtype.
        ValueError: shapes or devices don't fit, or a row is empty.

    Example:
        >>> codes, scale = quantize_rows(x)
        >>> y = qlinear(codes, qweight, weight_scale, x_scale=scale)
    """
    _check(x, per_sample, in_scale)
    codes, scale = _op(x, per_sample, in_scale)
    return codes, scale
