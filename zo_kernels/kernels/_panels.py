# SPDX-License-Identifier: Apache-2.0
"""Tiles of a packed weight: from the words of `zo_kernels.packing` to codes [N, K] in registers.

A panel of 16 rows is one run of bytes, 64 for each step of 4 (8 bits) or 8 (4 bits) codes of each
row. So a tile of BLOCK_N rows is BLOCK_N / 16 runs of half a KB or more, which come 16 bytes at a
time. A word of 4 bytes is 4 codes of a row in the order of k, just what a register of an int8
tensor core instruction holds: reshapes and permutes below rename registers and move nothing.

Arithmetic is on words, four codes at once. Codes of 4 bits count in sixteenths of a code here, so
that a nibble becomes a signed byte by a mask: 16 (u - 8) = (16 u) ^ 0x80.
"""

import triton
import triton.language as tl

from zo_kernels import packing
from zo_kernels.kernels._noise import sign_nibbles

PANEL = tl.constexpr(packing.PANEL)  # rows, and words of a step


@triton.jit
def load_panels(
    weight_ptr,  # int32 [panels, steps of all taps, 16]
    n_first,  # int64
    tap, c_first, n, channels, taps,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """uint32 [BLOCK_N / 16, words]: rows from n_first on, channels c_first... of one tap."""
    STEP: tl.constexpr = 32 // BITS  # codes of a row in a step
    steps = tl.cdiv(channels, STEP)
    panel = n_first // PANEL + tl.arange(0, BLOCK_N // PANEL)[:, None]
    at = tl.arange(0, BLOCK_K // STEP * PANEL)[None, :]  # within the tile's steps
    first = (tap * steps + c_first // STEP) * PANEL
    there = (panel * PANEL < n) & (at < (steps - c_first // STEP) * PANEL)
    words = tl.load(weight_ptr + panel * (taps * steps * PANEL) + first + at, there, other=0)
    return words.to(tl.uint32, bitcast=True)


@triton.jit
def signed_words(u, BITS: tl.constexpr):
    """Four signed bytes a word, of what `load_panels` gave: [P, words], or [P, words, 2]."""
    if BITS == 8:
        q = u ^ 0x80808080
    else:  # the high nibbles are 4 channels on
        q = tl.join(((u << 4) & 0xF0F0F0F0) ^ 0x80808080, (u & 0xF0F0F0F0) ^ 0x80808080)
    return q


@triton.jit
def noise_words(
    first, stream, draw, seed, value,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """value * R as bytes, in the order of `signed_words`; value is an int32 up to 127.

    `first` is the number of the first element of each row, int64 [BLOCK_N].
    """
    bits = sign_nibbles(first, stream, draw, seed, BLOCK_N, BLOCK_K, ALIGNED)
    PANELS: tl.constexpr = BLOCK_N // PANEL
    if BITS == 8:
        bits = bits.reshape(PANELS, PANEL, BLOCK_K // 4).permute(0, 2, 1)
        bits = bits.reshape(PANELS, BLOCK_K // 4 * PANEL)
    else:
        bits = bits.reshape(PANELS, PANEL, BLOCK_K // 8, 2).permute(0, 2, 1, 3)
        bits = bits.reshape(PANELS, BLOCK_K // 8 * PANEL, 2)
    is_minus = ((bits & 15) * 0x00204081) & 0x01010101  # bit i in byte i
    plus, change = value & 0xFF, (value ^ -value) & 0xFF
    return (is_minus * change.to(tl.uint32)) ^ (plus * 0x01010101).to(tl.uint32)


@triton.jit
def add_bytes(x, y):
    """x + y, byte by byte."""
    return ((x & 0x7F7F7F7F) + (y & 0x7F7F7F7F)) ^ ((x ^ y) & 0x80808080)


@triton.jit
def codes_of(q, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """int8 [BLOCK_N, BLOCK_K] of words. What lies beyond N or C is any number."""
    b0, b1, b2, b3 = q.to(tl.uint8), (q >> 8).to(tl.uint8), (q >> 16).to(tl.uint8), q >> 24
    b = tl.join(tl.join(b0, b2), tl.join(b1, b3.to(tl.uint8))).to(tl.int8, bitcast=True)
    PANELS: tl.constexpr = BLOCK_N // PANEL
    if BITS == 8:
        b = b.reshape(PANELS, BLOCK_K // 4, PANEL, 4).permute(0, 2, 1, 3)
    else:
        b = b.reshape(PANELS, BLOCK_K // 8, PANEL, 8).permute(0, 2, 1, 3)
    return b.reshape(BLOCK_N, BLOCK_K)
