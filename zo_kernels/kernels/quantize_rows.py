# SPDX-License-Identifier: Apache-2.0
"""`quantize_rows` in Triton: scale = max |x| / 127 and codes = round(x * (127 / max |x|)).

x is fp32, bf16 or fp16 [M, K] with rows one after another, or channels_last pictures [B, H W C];
codes are int8 in the same order, scale fp32 [M] or [B], in_scale fp32 [K] or [C].
Traffic: one read of x (two where a row has more than LONGEST elements, and for pictures) and one
write of codes. Each step is one correctly rounded fp32 operation, so that the bits are those of the
reference. The largest magnitude of a picture is found by many programs, which meet in an atomic
maximum of its bits: the order of maxima does not matter, nan is above infinity.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 8192  # elements that a program keeps in registers
BLOCK = 4096  # of a picture, a program
WARPS = 8

_INFINITY = tl.constexpr(0x7F800000)
_SMALLEST = tl.constexpr(2.0**-100)
_MIDDLE = tl.constexpr(1.5 * 2.0**23)  # x + it - it rounds to the nearest, ties to even


@triton.jit
def load_scaled(x_ptr, in_scale_ptr, i, channel, mask):
    """x times its channel's factor, fp32."""
    x = tl.load(x_ptr + i, mask, other=0.0).to(tl.float32)
    if in_scale_ptr is not None:
        x = x * tl.load(in_scale_ptr + channel, mask, other=0.0)
    return x


@triton.jit
def magnitude(x):
    """Bits of |x|, int32: of two, the larger number has the larger ones."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def usable(largest):
    return (largest < _INFINITY) & (largest.to(tl.float32, bitcast=True) >= _SMALLEST)


@triton.jit
def scale_of(largest):
    value = largest.to(tl.float32, bitcast=True)
    scale = tl.where(usable(largest), tl.div_rn(value, 127.0), 0.0)
    return tl.where(largest < _INFINITY, scale, float("nan"))


@triton.jit
def codes_of(x, largest):
    """int8; `largest` is broadcast over x."""
    good = usable(largest)
    value = tl.where(good, largest.to(tl.float32, bitcast=True), 1.0)
    factor = tl.div_rn(127.0, value)
    rounded = (tl.where(good, x, 0.0) * factor + _MIDDLE) - _MIDDLE
    return rounded.to(tl.int32).to(tl.int8)


@triton.jit(do_not_specialize=["rows"])
def _quantize_rows_kernel(
    x_ptr,  # [rows, k]
    in_scale_ptr,  # [k]
    codes_ptr,  # [rows, k]
    scale_ptr,  # [rows]
    rows: tl.int64,
    k,
    stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    there = row < rows
    if WHOLE:
        mask = there & (column < k)
        x = load_scaled(x_ptr, in_scale_ptr, row * stride + column, column, mask)
        largest = tl.max(magnitude(x), 1)[:, None]
        tl.store(codes_ptr + row * k + column, codes_of(x, largest), mask)
    else:
        most = tl.zeros((ROWS, BLOCK), tl.int32)
        for start in range(0, k, BLOCK):
            at = start + column
            x = load_scaled(x_ptr, in_scale_ptr, row * stride + at, at, there & (at < k))
            most = tl.maximum(most, magnitude(x))
        largest = tl.max(most, 1)[:, None]
        for start in range(0, k, BLOCK):
            at = start + column
            mask = there & (at < k)
            x = load_scaled(x_ptr, in_scale_ptr, row * stride + at, at, mask)
            tl.store(codes_ptr + row * k + at, codes_of(x, largest), mask)
    tl.store(scale_ptr + row, scale_of(largest), there)


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
    if in_scale is not None:
        in_scale = in_scale.contiguous()
    with torch.cuda.device_of(x):
        return (_pictures if per_sample else _rows)(x, in_scale)


def _rows(x: Tensor, in_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    flat = x.reshape(-1, k)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    block = min(triton.next_power_of_2(k), LONGEST)
    together = max(1, 1024 // block)
    if len(flat):
        _quantize_rows_kernel[(triton.cdiv(len(flat), together),)](
            *(flat, in_scale, codes, scale, len(flat), k, flat.stride(0)),
            ROWS=together,
            BLOCK=block,
            WHOLE=k <= block,
            num_warps=WARPS if block * together > 1024 else 4,
            enable_fp_fusion=False,
        )
    return codes, scale


def _pictures(x: Tensor, in_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    pixels = x.permute(0, 2, 3, 1).contiguous()
    codes = x.new_empty(pixels.shape, dtype=torch.int8)
    scale = x.new_empty(len(x), dtype=torch.float32)
    largest = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    size, channels = pixels[:1].numel(), pixels.shape[-1]
    if len(x):
        grid = (len(x) * triton.cdiv(size, BLOCK),)
        options = {"BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": False}
        _quantize_pictures_largest_kernel[grid](
            pixels, in_scale, largest, size, channels, **options
        )
        _quantize_pictures_codes_kernel[grid](
            pixels, in_scale, largest, codes, scale, size, channels, **options
        )
    return codes.permute(0, 3, 1, 2), scale
