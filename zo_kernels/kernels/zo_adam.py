# SPDX-License-Identifier: Apache-2.0
"""`zo_adam_` in Triton: Adam on g = sum_j coeffs[j] * z(seed, draws[j], stream, .).

    m <- m + rest1 (g - m),    v <- beta2 v + rest2 g^2
    p <- decay p + m / (sqrt(v inverse_bias2) + adam_eps) step

p is fp32, bf16 or fp16 [n], m and v fp32 [n], row-major, of a table; draws int64 [T + 1] and coeffs
fp32 [T] lie on their device. Traffic: one read and one write of each of them. Noise, rounding and
launch: `zo_kernels.kernels._updates`. Source: Adam (Kingma and Ba 2015).
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
    write,
)


@triton.jit
def _step(p, m, v, g, middle, hyper_ptr, GRID: tl.constexpr):
    rest1, beta2, rest2 = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2)
    inverse_bias2, adam_eps = tl.load(hyper_ptr + 3), tl.load(hyper_ptr + 4)
    step, decay = tl.load(hyper_ptr + 5), tl.load(hyper_ptr + 6)
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * (g * g)
    change = tl.div_rn(m, tl.sqrt_rn(v * inverse_bias2) + adam_eps) * step
    return snap(decay * p, middle, GRID) + snap(change, middle, GRID), m, v


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def _zo_adam__kernel(
    rows_ptr,  # [tensors, ROW]
    chunks_ptr,  # [programs]
    base_ptr,  # [1]
    draws_ptr,  # [terms + 1]
    factors_ptr,  # [terms]
    hyper_ptr,  # [7]: rest1, beta2, rest2, inverse_bias2, adam_eps, step, decay
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
    m_ptr = pointer(row_ptr, 1, tl.float32, ALIGNED)  # [n]
    v_ptr = pointer(row_ptr, 2, tl.float32, ALIGNED)  # [n]
    for number in range(count):
        block, start, short, i0, i1, i2, i3 = elements(first + number, n, NORMAL, BLOCKS)
        p0, p1, p2, p3 = load(p_ptr + start, i0, i1, i2, i3, short)
        m0, m1, m2, m3 = load(m_ptr + start, i0, i1, i2, i3, short)
        v0, v1, v2, v3 = load(v_ptr + start, i0, i1, i2, i3, short)
        zero = tl.zeros(i0.shape, tl.float32)
        g0, g1, g2, g3 = accumulate(
            zero, zero, zero, zero, block, stream, seed, base_ptr, draws_ptr, factors_ptr, terms,
            middle, NORMAL, False,
        )  # fmt: skip
        p0, m0, v0 = _step(p0, m0, v0, g0, middle, hyper_ptr, GRID)
        p1, m1, v1 = _step(p1, m1, v1, g1, middle, hyper_ptr, GRID)
        p2, m2, v2 = _step(p2, m2, v2, g2, middle, hyper_ptr, GRID)
        p3, m3, v3 = _step(p3, m3, v3, g3, middle, hyper_ptr, GRID)
        write(m_ptr + start, i0, i1, i2, i3, short, m0, m1, m2, m3)
        write(v_ptr + start, i0, i1, i2, i3, short, v0, v1, v2, v3)
        store(
            p_ptr + start, i0, i1, i2, i3, short, p0, p1, p2, p3, block, stream, seed, base_ptr,
            draws_ptr + terms, NORMAL, ROUNDS,
        )  # fmt: skip


def zo_adam__triton(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    coeffs: Tensor,
    hyper: Tensor,
    kind: str,
    quanta: Tensor | None = None,
    round_draw: int | None = None,
    at: tuple[Tensor, Tensor] | None = None,
) -> None:
    """One launch a dtype. The arguments are those of the op, checked; params contiguous. `at`: see
    `launch`."""
    states, terms = (exp_avgs, exp_avg_sqs), (streams, seed, draws, coeffs)
    launch(_zo_adam__kernel, params, states, *terms, hyper, kind, quanta, round_draw, at)
