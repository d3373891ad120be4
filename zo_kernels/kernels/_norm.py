# SPDX-License-Identifier: Apache-2.0
"""What `group_norm` and `group_norm_quantize` in Triton share: y = (x + before) * by + after.

x is fp32, bf16 or fp16 [B, H W, C], channels_last pixels. One read of x gives each channel's sums
of d and d^2, d = x - its first pixel, over blocks of PIXELS; a program for each group joins them in
fp64 and leaves the three factors of each channel, fp32 [B, 3, C]. What follows reads x again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._epilogue import activated

PIXELS = 256  # of a program
ROWS = 16  # of them at a time
CHANNELS = 128
WARPS = 4
BLOCK = 4096  # values of y that a program makes


@triton.jit
def _moments_kernel(
    x_ptr,  # [B, pixels, channels]
    sums_ptr,  # [B, blocks, 2, channels]
    pixels, channels,
    PIXELS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    blocks, slices = tl.cdiv(pixels, PIXELS), tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % slices * CHANNELS + tl.arange(0, CHANNELS)  # [CHANNELS]
    block = tl.program_id(0) // slices  # of all samples
    x_ptr += (block // blocks).to(tl.int64) * pixels * channels
    there = c < channels
    pivot = tl.load(x_ptr + c, there, other=0.0).to(tl.float32)
    total = tl.zeros((CHANNELS,), tl.float32)
    squares = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, PIXELS, ROWS):
        pixel = block % blocks * PIXELS + start + tl.arange(0, ROWS)[:, None]
        mask = (pixel < pixels) & there[None, :]
        x = tl.load(x_ptr + pixel.to(tl.int64) * channels + c[None, :], mask, other=0.0)
        d = tl.where(mask, x.to(tl.float32) - pivot[None, :], 0.0)  # [ROWS, CHANNELS]
        total += tl.sum(d, 0)
        squares += tl.sum(d * d, 0)
    at = block.to(tl.int64) * 2 * channels + c
    tl.store(sums_ptr + at, total, there)
    tl.store(sums_ptr + at + channels, squares, there)


@triton.jit
def _float64(ptr, at, there, DEFAULT: tl.constexpr):
    if ptr is None:
        value = tl.full(at.shape, DEFAULT, tl.float64)
    else:
        value = tl.load(ptr + at, there, other=0.0).to(tl.float64)
    return value


@triton.jit
def _factors_kernel(
    x_ptr, sums_ptr,  # see `_moments_kernel`
    weight_ptr, bias_ptr,  # [channels]
    shift_ptr,  # [B, channels]
    factors_ptr,  # [B, 3, channels]
    pixels, channels, groups, blocks, eps,
    SIZE: tl.constexpr,  # a power of two, from the channels of a group on
):  # fmt: skip
    sample = (tl.program_id(0) // groups).to(tl.int64)
    size = channels // groups
    j = tl.arange(0, SIZE)
    c, there = tl.program_id(0) % groups * size + j, j < size
    total, squares = tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.float64)
    for block in range(blocks):
        at = (sample * blocks + block) * 2 * channels + c
        total += _float64(sums_ptr, at, there, 0.0)
        squares += _float64(sums_ptr, at + channels, there, 0.0)
    offset = total / pixels
    shift = _float64(shift_ptr, sample * channels + c, there, 0.0)
    first = _float64(x_ptr, sample * pixels * channels + c, there, 0.0)
    means = first + tl.where(there, shift, 0.0) + offset
    mean = tl.sum(means, 0) / size
    apart = tl.where(there, means - mean, 0.0)
    variance = tl.sum(squares / pixels - offset * offset + apart * apart, 0) / size
    variance = tl.where(variance < 0, 0.0, variance)  # nan stays
    rate = 1.0 / tl.sqrt(variance + eps)
    at = sample * 3 * channels + c
    tl.store(factors_ptr + at, (shift - mean).to(tl.float32), there)
    by = rate * _float64(weight_ptr, c, there, 1.0)
    tl.store(factors_ptr + at + channels, by.to(tl.float32), there)
    after = _float64(bias_ptr, c, there, 0.0)
    tl.store(factors_ptr + at + 2 * channels, after.to(tl.float32), there)


@triton.jit
def normalized(
    x_ptr, factors_ptr, sample, i, size, channels, ACTIVATION: tl.constexpr
):  # sample int64
    """y of the elements i of a sample of `size` elements, fp32."""
    there = i < size
    x = tl.load(x_ptr + sample * size + i, there, other=0.0).to(tl.float32)
    at = factors_ptr + sample * 3 * channels + i % channels
    before, by = tl.load(at, there, other=0.0), tl.load(at + channels, there, other=0.0)
    y = (x + before) * by + tl.load(at + 2 * channels, there, other=0.0)
    return activated(y, ACTIVATION)


def passes(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Callable[..., None]]:
    """Pixels [B, H, W, C] of x, copied unless channels_last, and what runs a kernel over them.

    The arguments are those of the op, checked. The second result takes `kernel(pixels, factors,
    *outputs, size, channels, ...)`, a program for BLOCK values of a sample, and its outputs.
    """
    pixels = x.permute(0, 2, 3, 1).contiguous()
    batch, channels, size = len(x), x.shape[1], pixels[:1].numel()
    by = pixels.new_empty((batch, 3, channels), dtype=torch.float32)
    grid = (batch * triton.cdiv(size, BLOCK),)

    def run(kernel: Any, *outputs: Tensor) -> None:
        if batch:
            with torch.cuda.device_of(x):
                kernel[grid](
                    *(pixels, by, *outputs, size, channels),
                    ACTIVATION=activation,
                    BLOCK=BLOCK,
                    num_warps=8,
                    enable_fp_fusion=False,
                )

    if batch:
        more = [t if t is None else t.contiguous() for t in (weight, bias, shift)]
        with torch.cuda.device_of(x):
            _write_factors(pixels, groups, eps, more, by)
    return pixels, run


def _write_factors(
    pixels: Tensor,
    groups: int,
    eps: float,
    more: Sequence[Tensor | None],  # weight, bias, shift
    out: Tensor,  # fp32 [B, 3, C]
) -> None:
    batch, height, width, channels = pixels.shape
    count, options = height * width, {"num_warps": WARPS, "enable_fp_fusion": False}
    blocks = triton.cdiv(count, PIXELS)
    sums = pixels.new_empty((batch, blocks, 2, channels), dtype=torch.float32)
    grid = (batch * blocks * triton.cdiv(channels, CHANNELS),)
    cut = {"PIXELS": PIXELS, "ROWS": ROWS, "CHANNELS": CHANNELS}
    _moments_kernel[grid](pixels, sums, count, channels, **cut, **options)
    _factors_kernel[(batch * groups,)](
        *(pixels, sums, *more, out, count, channels, groups, blocks, eps),
        SIZE=triton.next_power_of_2(channels // groups),
        **options,
    )
