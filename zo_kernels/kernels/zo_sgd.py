# SPDX-License-Identifier: Apache-2.0
"""`zo_sgd_` in Triton: b <- momentum * b + g, p <- decay * p + step * b, or sign(b) for b.

p is fp32, bf16 or fp16 [n], b fp32 [n], row-major, of a table; draws int64 [T + 1] and coeffs fp32
[T] lie on their device. Traffic: one read and one write of p and of b; without a buffer, b is g and
b_ptr is unused. Noise, rounding and launch: `zo_kernels.kernels._updates`.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._table import chunk_of, pointer
from zo_kernels.kernels._updates import (
    RUNTIME,
    UNALIGNED,
    accumulate,
    elements,
    launch,
    load,
    snap,
    store,
    write,
)


@triton.jit
def _step(
    p, b, middle, step, decay, SIGN: tl.constexpr, GRID: tl.constexpr
):  # fmt: skip
    if SIGN:
        b = (b > 0).to(tl.float32) - (b < 0).to(tl.float32)
    return snap(decay * p, middle, GRID) + snap(step * b, middle, GRID)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def _zo_sgd__kernel(
    rows_ptr,  # [tensors, ROW]
    chunks_ptr,  # [programs]
    base_ptr,  # [1]
    draws_ptr,  # [terms + 1]
    factors_ptr,  # [terms]
    hyper_ptr,  # [3]: momentum, step, decay
    seed: tl.int64,
    terms: tl.int32,
    tiles: tl.int32,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NORMAL: tl.constexpr,
    GRID: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIGN: tl.constexpr,
    BUFFER: tl.constexpr,
):
    TILE: tl.constexpr = 4 * BLOCKS if NORMAL else 128 * BLOCKS
    row_ptr, n, stream, middle, first, count = chunk_of(rows_ptr, chunks_ptr, tiles, TILE)
    p_ptr = pointer(row_ptr, 0, DTYPE, ALIGNED)  # [n]
    b_ptr = pointer(row_ptr, 1, tl.float32, ALIGNED)  # [n]
    momentum, step, decay = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2)
    for number in range(count):
        block, start, short, i0, i1, i2, i3 = elements(first + number, n, NORMAL, BLOCKS)
        p0, p1, p2, p3 = load(p_ptr + start, i0, i1, i2, i3, short)
        zero = tl.zeros(i0.shape, tl.float32)
        b0, b1, b2, b3 = accumulate(
            zero, zero, zero, zero, block, stream, seed, base_ptr, draws_ptr, factors_ptr, terms,
            middle, NORMAL, False,
        )  # fmt: skip
        if BUFFER:
            m0, m1, m2, m3 = load(b_ptr + start, i0, i1, i2, i3, short)
            b0, b1 = momentum * m0 + b0, momentum * m1 + b1
            b2, b3 = momentum * m2 + b2, momentum * m3 + b3
            write(b_ptr + start, i0, i1, i2, i3, short, b0, b1, b2, b3)
        p0 = _step(p0, b0, middle, step, decay, SIGN, GRID)
        p1 = _step(p1, b1, middle, step, decay, SIGN, GRID)
        p2 = _step(p2, b2, middle, step, decay, SIGN, GRID)
        p3 = _step(p3, b3, middle, step, decay, SIGN, GRID)
        store(
            p_ptr + start, i0, i1, i2, i3, short, p0, p1, p2, p3, block, stream, seed, base_ptr,
            draws_ptr + terms, NORMAL, ROUNDS,
        )  # fmt: skip


def zo_sgd__triton(
    params: Sequence[Tensor],
    buffers: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    coeffs: Tensor,
    hyper: Tensor,
    sign: bool,
    kind: str,
    quanta: Tensor | None = None,
    round_draw: int | None = None,
    at: tuple[Tensor, Tensor] | None = None,
) -> None:
    """One launch a dtype. The arguments are those of the op, checked; params contiguous. `at`: see
    `launch`."""
    states, terms = (buffers,) if buffers else (), (streams, seed, draws, coeffs)
    constants: dict[str, Any] = {"SIGN": sign, "BUFFER": bool(buffers)}
    launch(
        *(_zo_sgd__kernel, params, states, *terms, hyper, kind, quanta, round_draw, at),
        **constants,
    )
