# SPDX-License-Identifier: Apache-2.0
"""`quantize_rows` in Triton: scale = max |x| / 127 and codes = round(x * (127 / max |x|)).

x is fp32, bf16 or fp16 [M, K] with rows one after another (`zo_kernels.kernels._rows`), or
channels_last pictures [B, H W C]; codes are int8 in the same order, scale fp32 [M] or [B], in_scale
fp32 [K] or [C]. Traffic of pictures: two reads of x and one write of codes. The largest magnitude
of a picture is found by many programs, which meet in an atomic maximum of its bits: the order of
maxima does not matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._codes import codes_of, magnitude, scale_of
from zo_kernels.kernels._rows import rows_to_codes

BLOCK = 4096  # values of a picture, a program
WARPS = 8


@triton.jit
def load_scaled(x_ptr, in_scale_ptr, i, channel, mask):
    """x times its channel's factor, fp32."""
    x = tl.load(x_ptr + i, mask, other=0.0).to(tl.float32)
    if in_scale_ptr is not None:
        x = x * tl.load(in_scale_ptr + channel, mask, other=0.0)
    return x


@triton.jit
def piece(size, BLOCK: tl.constexpr):
    """Picture of this program, its element numbers in there, and where that picture starts."""
    pieces = tl.cdiv(size, BLOCK)
    picture = tl.program_id(0) // pieces
    i = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    return picture, i, picture.to(tl.int64) * size


@triton.jit
def _quantize_pictures_largest_kernel(
    x_ptr,  # [B, size]
    in_scale_ptr,  # [channels]
    largest_ptr,  # [B], zeros before
    size,
    channels,
    BLOCK: tl.constexpr,
):
    picture, i, start = piece(size, BLOCK)
    x = load_scaled(x_ptr, in_scale_ptr, start + i, i % channels, i < size)
    tl.atomic_max(largest_ptr + picture, tl.max(magnitude(x), 0))


@triton.jit
def _quantize_pictures_codes_kernel(
    x_ptr,  # [B, size]
    in_scale_ptr,  # [channels]
    largest_ptr,  # [B]
    codes_ptr,  # [B, size]
    scale_ptr,  # [B]
    size,
    channels,
    BLOCK: tl.constexpr,
):
    picture, i, start = piece(size, BLOCK)
    largest = tl.load(largest_ptr + picture)
    x = load_scaled(x_ptr, in_scale_ptr, start + i, i % channels, i < size)
    tl.store(codes_ptr + start + i, codes_of(x, largest), i < size)
    tl.store(scale_ptr + picture, scale_of(largest))  # by each program of a picture, the same


def quantize_rows_triton(
    x: Tensor, per_sample: bool = False, in_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The arguments are those of the op, checked. x is copied where it does not lie as above."""
    return _pictures(x, in_scale) if per_sample else rows_to_codes(x, in_scale)


def _pictures(x: Tensor, in_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    pixels = x.permute(0, 2, 3, 1).contiguous()
    codes = x.new_empty(pixels.shape, dtype=torch.int8)
    scale = x.new_empty(len(x), dtype=torch.float32)
    largest = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    in_scale = None if in_scale is None else in_scale.contiguous()
    size, channels = pixels[:1].numel(), pixels.shape[-1]
    if len(x):
        grid = (len(x) * triton.cdiv(size, BLOCK),)
        options = {"BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": False}
        with torch.cuda.device_of(x):
            _quantize_pictures_largest_kernel[grid](
                pixels, in_scale, largest, size, channels, **options
            )
            _quantize_pictures_codes_kernel[grid](
                pixels, in_scale, largest, codes, scale, size, channels, **options
            )
    return codes.permute(0, 3, 1, 2), scale
