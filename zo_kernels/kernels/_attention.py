# SPDX-License-Identifier: Apache-2.0
"""Keys and values as the Triton kernel of `qattention` multiplies them: fp16 [2, B, heads, L, D].

A number becomes x * 2^(14 - e), where 2^e is the power of two below the largest magnitude that it
shares a unit with: of a head's keys, or of a channel's values. So fp16 numbers keep their bits,
fp32 numbers 11 of them, and nothing overflows. L is padded to KEYS with zeros, D to what tensor
cores take. Traffic: two reads of keys and values, one write of fp16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._codes import is_finite, magnitude, usable

KEYS = 128  # a multiple of every block of keys
BLOCK = 128  # channels of a program
ROWS, VISITS = 32, 8  # keys at a time, and how often
VALUES = 8192  # of a program that writes

_EXPONENT = tl.constexpr(0x7F800000)
_BIAS = tl.constexpr(14 << 23)
_ONE_TWICE = tl.constexpr(254 << 23)  # it - the bits of a power of two are those of its inverse


@triton.jit
def unit_of(largest):
    """fp32 2^(e - 14); 0 where all is below 2^-100, nan where anything is not finite."""
    unit = ((largest & _EXPONENT) - _BIAS).to(tl.float32, bitcast=True)
    return tl.where(is_finite(largest), tl.where(usable(largest), unit, 0.0), float("nan"))


@triton.jit
def halves_of(x, largest):
    """fp16 below 2^15; `largest` is broadcast over x."""
    good = usable(largest)
    by = (-((largest & _EXPONENT) - _BIAS) + _ONE_TWICE).to(tl.float32, bitcast=True)
    return tl.where(good, x * by, 0.0).to(tl.float16)


@triton.jit
def _load(
    of_values, key_ptr, value_ptr, sample, row, c, there, key_sample, key_row, value_sample,
    value_row,
):  # fmt: skip
    """fp32, of keys or of values. The branch is here because a pointer of either is too much for
    Triton's AMD backend."""
    if of_values:
        at = sample * value_sample + row.to(tl.int64) * value_row + c
        x = tl.load(value_ptr + at, there, other=0.0).to(tl.float32)
    else:
        at = sample * key_sample + row.to(tl.int64) * key_row + c
        x = tl.load(key_ptr + at, there, other=0.0).to(tl.float32)
    return x


@triton.jit
def _attention_largest_kernel(
    key_ptr, value_ptr,  # [B, keys, width]
    largest_ptr,  # [2, B, width], zeros before
    batch, keys, width,
    key_sample: tl.int64, key_row: tl.int64,  # strides
    value_sample: tl.int64, value_row: tl.int64,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, VISITS: tl.constexpr,
):  # fmt: skip
    """Bits of the largest magnitude of each channel, of keys and of values."""
    slices, of_values = tl.cdiv(width, BLOCK), tl.program_id(1)
    c = tl.program_id(0) % slices * BLOCK + tl.arange(0, BLOCK)
    block = tl.program_id(0) // slices
    blocks = tl.cdiv(keys, ROWS * VISITS)
    sample = (block // blocks).to(tl.int64)
    most = tl.zeros((ROWS, BLOCK), tl.int32)
    for i in range(VISITS):
        row = ((block % blocks * VISITS + i) * ROWS + tl.arange(0, ROWS))[:, None]
        there = (row < keys) & (c < width)[None, :]
        x = _load(
            of_values, key_ptr, value_ptr, sample, row, c[None, :], there, key_sample, key_row,
            value_sample, value_row,
        )  # fmt: skip
        most = tl.maximum(most, magnitude(x))
    at = (of_values * batch + sample) * width + c
    tl.atomic_max(largest_ptr + at, tl.max(most, 0), c < width)


@triton.jit
def _attention_halves_kernel(
    key_ptr, value_ptr,  # [B, keys, width]
    largest_ptr,  # [2, B, width]
    out_ptr,  # [2, B, heads, padded, DEPTH]
    batch, keys, padded, width, heads, depth,
    key_sample: tl.int64, key_row: tl.int64,
    value_sample: tl.int64, value_row: tl.int64,
    DEPTH: tl.constexpr, SIZE: tl.constexpr,  # a power of two, from DEPTH on
    ROWS: tl.constexpr,
):  # fmt: skip
    of_values, blocks = tl.program_id(1), padded // ROWS
    row = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS))[:, None]
    head = tl.program_id(0) // blocks % heads
    sample = (tl.program_id(0) // blocks // heads).to(tl.int64)
    d = tl.arange(0, SIZE)
    at = (of_values * batch + sample) * width + head * depth + d
    largest = tl.load(largest_ptr + at, d < depth, other=0)
    largest = tl.where(of_values > 0, largest, tl.max(largest, 0))
    there = (row < keys) & (d < depth)[None, :]
    x = _load(
        of_values, key_ptr, value_ptr, sample, row, (head * depth + d)[None, :], there, key_sample,
        key_row, value_sample, value_row,
    )  # fmt: skip
    at = (of_values * batch + sample) * heads + head
    at = (at * padded + row) * DEPTH + d[None, :]
    tl.store(out_ptr + at, halves_of(x, largest[None, :]), (d < DEPTH)[None, :] & (row < padded))


def halves(key: Tensor, value: Tensor, heads: int, depth: int) -> tuple[Tensor, Tensor]:
    """fp16 [2, B, heads, padded keys, depth] of keys and values [B, L, heads * D], and int32
    [2, B, heads * D], from which `unit_of` makes their units; depth is D, padded."""
    batch, keys, width = key.shape
    strides = *key.stride()[:2], *value.stride()[:2]
    largest = torch.zeros((2, batch, width), dtype=torch.int32, device=key.device)
    padded = triton.cdiv(keys, KEYS) * KEYS
    out = key.new_empty((2, batch, heads, padded, depth), dtype=torch.float16)
    grid = (batch * triton.cdiv(keys, ROWS * VISITS) * triton.cdiv(width, BLOCK), 2)
    cut = {"BLOCK": BLOCK, "ROWS": ROWS, "VISITS": VISITS}
    _attention_largest_kernel[grid](key, value, largest, batch, keys, width, *strides, **cut)
    size = triton.next_power_of_2(depth)
    rows = min(KEYS, VALUES // size)
    _attention_halves_kernel[(batch * heads * (padded // rows), 2)](
        *(key, value, largest, out, batch, keys, padded, width, heads, width // heads, *strides),
        DEPTH=depth,
        SIZE=size,
        ROWS=rows,
    )
    return out, largest
