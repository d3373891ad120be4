# SPDX-License-Identifier: Apache-2.0
"""The product of `qlinear` and `qconv2d` in Triton, an implicit GEMM over the packed weight.

    acc_g[m, n] = sum over k in group g of a[m, k] * (q[n, k] - z[n, g])
    y = (acc_0 * scale[n, 0] + acc_1 * scale[n, 1] + ...) * a_scale[m], and `finish`

a is int8 (INTEGER: sums are int32 and exact) or floating. Codes are exact in fp16 and bf16; a of 16
bits is multiplied in its own dtype, fp32 as three bf16 numbers whose sum it is (PARTS = 3).
k = tap * channels + channel; the rows of a convolution are the pixels of its output, and a is read
where the tap falls: there is no im2col buffer.

Perturbed scales are made of noise in registers, moved codes likewise; R of PERTURB "weight" is a
second product with the same tile of a. A tile belongs to one perturbation. The tiles that share a
panel of the weight run side by side, so that its bytes come from memory once and then from L2.

With few rows the k of a tile is split among SPLITS programs, which write their sums for
`_epilogue._join_kernel`: sums of integers are exact in any order, sums of floats have one order.
"""

import triton
import triton.language as tl

from zo_kernels.kernels._epilogue import finish, moved_sums, scale_at
from zo_kernels.kernels._panels import (
    add_bytes,
    codes_of,
    load_panels,
    noise_words,
    signed_words,
)

# Change from call to call, or take values that a kernel of their own would not serve better.
RUNTIME = ["seed", "stream", "rows"]
_SIDE_BY_SIDE = tl.constexpr(8)  # tiles of output rows that take turns at one panel
_EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def _cut(x):
    """The part of fp32 x that a bf16 number holds, cut off, and the rest; both exact."""
    bits = x.to(tl.int32, bitcast=True)
    top = (bits & -65536).to(tl.float32, bitcast=True)
    finite = (bits & _EXPONENT) != _EXPONENT  # infinity has no rest, nan is one
    return top.to(tl.bfloat16), tl.where(finite | (x != x), x - top, 0.0)


@triton.jit
def _product(w, a, acc, PARTS: tl.constexpr):
    """acc [n, m] + w [n, k] * a [m, k], where a is of the dtype of w, or fp32 in PARTS."""
    if PARTS == 1:
        acc = tl.dot(w, tl.trans(a), acc, out_dtype=acc.dtype)
    else:
        top, rest = _cut(a)
        middle, rest = _cut(rest)
        acc = tl.dot(w, tl.trans(top), acc)
        acc = tl.dot(w, tl.trans(middle), acc)
        acc = tl.dot(w, tl.trans(rest.to(tl.bfloat16)), acc)
    return acc


@triton.jit
def _tile_of(program, tiles_m, tiles_n):
    """Row and column of a program's tile: _SIDE_BY_SIDE rows, then the next column."""
    size = _SIDE_BY_SIDE * tiles_n
    first = program // size * _SIDE_BY_SIDE
    count = tl.minimum(tiles_m - first, _SIDE_BY_SIDE)
    return first + program % size % count, program % size // count


@triton.jit(do_not_specialize=RUNTIME)
def _product_kernel(
    a_ptr,  # [M, channels], or [B, height, width, channels]
    weight_ptr,  # packed
    scale_ptr, zero_ptr,  # [n, groups]
    in_scale_ptr,  # [channels]
    a_scale_ptr, bias_ptr, residual_ptr, y_ptr,  # see `finish`
    part_ptr,  # [SPLITS, M, n]
    draws_ptr, coeffs_ptr,  # [P]
    rows,  # of a perturbation: M / P
    n, channels, taps, groups, rows_of_a_scale,
    seed: tl.int64, stream: tl.int64,
    row_stride: tl.int64,  # of a, without CONV
    height, width, out_height, out_width, kernel_width,
    down, right, above, left, below, beside,  # stride, padding, dilation
    BITS: tl.constexpr, INTEGER: tl.constexpr, CONV: tl.constexpr,
    BLOCKS: tl.constexpr,  # tiles along k of a group, 0 where there is one group
    PERTURB: tl.constexpr, NORMAL: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr, PERTURBATIONS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    CODE: tl.constexpr = 16 if BITS == 4 else 1  # what a code counts in `_panels`
    tiles_of_rows = tl.cdiv(rows, BLOCK_M)
    tile_m, tile_n = _tile_of(
        tl.program_id(0) // SPLITS, tiles_of_rows * PERTURBATIONS, tl.cdiv(n, BLOCK_N)
    )  # fmt: skip
    split = tl.program_id(0) % SPLITS
    part = tile_m // tiles_of_rows
    row = (tile_m % tiles_of_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_there = row < rows
    m_ = part * rows + row  # [BLOCK_M]
    n_first = tile_n.to(tl.int64) * BLOCK_N
    n_ = n_first + tl.arange(0, BLOCK_N)  # [BLOCK_N], int64
    n_there = n_ < n
    column = tl.arange(0, BLOCK_K)
    coeff, draw = tl.full((), 0.0, tl.float32), seed
    if PERTURB != "none":
        coeff, draw = tl.load(coeffs_ptr + part), tl.load(draws_ptr + part)

    if CONV:
        pixels = out_height * out_width
        y0 = m_ % pixels // out_width * down - above
        x0 = m_ % out_width * right - left
        a_row = ((m_ // pixels * height + y0).to(tl.int64) * width + x0) * channels
    else:
        a_row = m_.to(tl.int64) * row_stride

    blocks_of_tap = tl.cdiv(channels, BLOCK_K)
    if BLOCKS:
        per_split = tl.cdiv(groups, SPLITS)
        first_group, last_group = split * per_split, tl.minimum(groups, (split + 1) * per_split)
        first_block, blocks = 0, BLOCKS
    else:
        per_split = tl.cdiv(taps * blocks_of_tap, SPLITS)
        first_group, last_group = 0, 1
        first_block = split * per_split
        blocks = tl.minimum(taps * blocks_of_tap - first_block, per_split)

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    for group in range(first_group, last_group):
        acc = tl.zeros((BLOCK_N, BLOCK_M), SUM)
        signed = tl.zeros((BLOCK_N, BLOCK_M), SUM)
        a_sum = tl.zeros((BLOCK_M,), tl.int32)
        zero = tl.zeros((BLOCK_N,), tl.float32)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + n_ * groups + group, n_there, other=0).to(tl.float32)
        for j in range(blocks):
            block = first_block + group * BLOCKS + j
            tap, c = block // blocks_of_tap, block % blocks_of_tap * BLOCK_K
            c_there = c + column < channels
            a_there = m_there
            a_at = a_row + c
            if CONV:
                r, s = tap // kernel_width * below, tap % kernel_width * beside
                a_there = a_there & (y0 + r >= 0) & (y0 + r < height)
                a_there = a_there & (x0 + s >= 0) & (x0 + s < width)
                a_at += (r.to(tl.int64) * width + s) * channels
            a = tl.load(
                a_ptr + a_at[:, None] + column[None, :],
                a_there[:, None] & c_there[None, :], other=0,
            )  # fmt: skip  # [BLOCK_M, BLOCK_K]
            u = load_panels(
                weight_ptr, n_first, tap, c, n, channels, taps, BITS, BLOCK_N, BLOCK_K
            )  # fmt: skip
            q = signed_words(u, BITS)
            if PERTURB == "weight" or PERTURB == "codes":
                first = (n_ * taps + tap) * channels + c
                step = coeff.to(tl.int32) if PERTURB == "codes" else tl.full((), CODE, tl.int32)
                moves = noise_words(
                    first, stream, draw, seed, step, BITS, BLOCK_N, BLOCK_K, ALIGNED
                )  # fmt: skip
                if PERTURB == "codes":
                    q = add_bytes(q, moves)
                else:
                    signs = codes_of(moves, BITS, BLOCK_N, BLOCK_K)
            w = codes_of(q, BITS, BLOCK_N, BLOCK_K)
            if INTEGER:
                if zero_ptr is not None:
                    a_sum += tl.sum(a.to(tl.int32), 1)
            else:
                if PERTURB == "weight":
                    signs = signs.to(tl.float32).to(DTYPE)
                w = (w.to(tl.float32) - zero[:, None] * CODE).to(DTYPE)
                if in_scale_ptr is not None:
                    by = tl.load(in_scale_ptr + c + column, c_there, other=0.0)
                    a = a.to(tl.float32) * by[None, :]
                a = a.to(tl.float32) if PARTS == 3 else a.to(DTYPE)
            acc = _product(w, a, acc, PARTS)
            if PERTURB == "weight":
                signed = _product(signs, a, signed, PARTS)
        if INTEGER and zero_ptr is not None:
            if BITS == 4:  # sixteenths of 8-bit zero points could overflow
                acc, signed = acc >> 4, signed >> 4
            acc -= zero.to(tl.int32)[:, None] * a_sum[None, :]
        if BLOCKS or SPLITS == 1:
            scale = scale_at(
                scale_ptr, n_ * groups + group, n_there, coeff, draw, stream, seed, PERTURB,
                NORMAL, UNIT,
            )  # fmt: skip
            term = moved_sums(acc, signed, coeff, PERTURB) * scale[:, None]
            total = tl.where(group == first_group, term, total + term)
        elif PERTURB == "weight":
            total = moved_sums(acc, signed, coeff, PERTURB)
    if SPLITS == 1:
        finish(
            total, n_, m_, n_there, m_there, a_scale_ptr, bias_ptr, residual_ptr, y_ptr, n,
            rows_of_a_scale, ACTIVATION,
        )  # fmt: skip
    else:
        first_row = (split * PERTURBATIONS * rows).to(tl.int64)
        at = (first_row + m_)[None, :] * n + n_[:, None]
        there = m_there[None, :] & n_there[:, None]
        if BLOCKS or PERTURB == "weight":
            tl.store(part_ptr + at, total, there)
        else:
            tl.store(part_ptr + at, acc, there)
