# SPDX-License-Identifier: Apache-2.0
"""`add_noise_` in Triton: p <- decay * p + sum_j scales[j] * z(seed, draws[j], stream, .).

p is fp32, bf16 or fp16 [n], row-major, of a table; draws int64 [T + 1] and scales fp32 [T] lie on
its device. Traffic: one read and one write of p. Noise, rounding and launch:
`zo_kernels.kernels._updates`.
Source: MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithm 1).
"""

from collections.abc import Sequence

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
)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def _add_noise__kernel(
    rows_ptr,  # [tensors, ROW]
    chunks_ptr,  # [programs]
    base_ptr,  # [1]
    draws_ptr,  # [terms + 1]
    factors_ptr,  # [terms]
    hyper_ptr,  # [1]: decay
    seed: tl.int64,
    terms: tl.int32,
    tiles: tl.int32,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NORMAL: tl.constexpr,
    GRID: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    TILE: tl.constexpr = 4 * BLOCKS if NORMAL else 128 * BLOCKS
    row_ptr, n, stream, middle, first, count = chunk_of(rows_ptr, chunks_ptr, tiles, TILE)
    p_ptr = pointer(row_ptr, 0, DTYPE, ALIGNED)  # [n]
    decay = tl.load(hyper_ptr)
    for number in range(count):
        block, start, short, i0, i1, i2, i3 = elements(first + number, n, NORMAL, BLOCKS)
        p0, p1, p2, p3 = load(p_ptr + start, i0, i1, i2, i3, short)
        p0, p1 = snap(decay * p0, middle, GRID), snap(decay * p1, middle, GRID)
        p2, p3 = snap(decay * p2, middle, GRID), snap(decay * p3, middle, GRID)
        p0, p1, p2, p3 = accumulate(
            p0, p1, p2, p3, block, stream, seed, base_ptr, draws_ptr, factors_ptr, terms, middle,
            NORMAL, GRID,
        )  # fmt: skip
        store(
            p_ptr + start, i0, i1, i2, i3, short, p0, p1, p2, p3, block, stream, seed, base_ptr,
            draws_ptr + terms, NORMAL, ROUNDS,
        )  # fmt: skip


def add_noise__triton(
    params: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    scales: Tensor,
    decay: Tensor,
    kind: str,
    quanta: Tensor | None = None,
    round_draw: int | None = None,
    at: tuple[Tensor, Tensor] | None = None,
) -> None:
    """One launch a dtype. The arguments are those of the op, checked; params contiguous. `at`: see
    `launch`."""
    terms = (streams, seed, draws, scales)
    launch(_add_noise__kernel, params, (), *terms, decay, kind, quanta, round_draw, at)
