# SPDX-License-Identifier: Apache-2.0
"""`zo_adam_` in Triton: Adam on g = sum_j coeffs[j] * z(seed, draws[j], stream, .).

    m <- m + rest1 (g - m),    v <- beta2 v + rest2 g^2
    p <- decay p + m / (sqrt(v inverse_bias2) + adam_eps) step

p is fp32, bf16 or fp16 [n], m and v fp32 [n], row-major; draws int64 [T] and coeffs fp32 [T] lie on
their device. Traffic: one read and one write of each of them. Noise and rounding:
`zo_kernels.kernels._updates`. Source: Adam (Kingma and Ba 2015).
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._updates import RUNTIME, accumulate, elements, launch, load, snap, store


@triton.jit
def _step(
    p_ptr, m_ptr, v_ptr, i, n, g, middle, rest1, beta2, rest2, inverse_bias2, adam_eps, step, decay,
    GRID: tl.constexpr,
):  # fmt: skip
    m = load(m_ptr, i, n)
    m = m + rest1 * (g - m)
    v = beta2 * load(v_ptr, i, n) + rest2 * (g * g)
    tl.store(m_ptr + i, m, i < n)
    tl.store(v_ptr + i, v, i < n)
    change = tl.div_rn(m, tl.sqrt_rn(v * inverse_bias2) + adam_eps) * step
    return snap(decay * load(p_ptr, i, n), middle, GRID) + snap(change, middle, GRID)


@triton.jit(do_not_specialize=RUNTIME)
def _zo_adam__kernel(
    p_ptr,  # [n]
    m_ptr,  # [n]
    v_ptr,  # [n]
    draws_ptr,  # [terms]
    coeffs_ptr,  # [terms]
    n: tl.int64,
    seed: tl.int64,
    stream: tl.int64,
    terms: tl.int32,
    round_draw: tl.int64,
    middle,
    rest1,
    beta2,
    rest2,
    inverse_bias2,
    adam_eps,
    step,
    decay,
    NORMAL: tl.constexpr,
    GRID: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block, i0, i1, i2, i3 = elements(NORMAL, BLOCKS)
    zero = tl.zeros(i0.shape, tl.float32)
    g0, g1, g2, g3 = accumulate(
        zero, zero, zero, zero, block, stream, seed, draws_ptr, coeffs_ptr, terms, middle,
        NORMAL, False,
    )  # fmt: skip
    p0 = _step(
        p_ptr, m_ptr, v_ptr, i0, n, g0, middle, rest1, beta2, rest2, inverse_bias2, adam_eps,
        step, decay, GRID,
    )  # fmt: skip
    p1 = _step(
        p_ptr, m_ptr, v_ptr, i1, n, g1, middle, rest1, beta2, rest2, inverse_bias2, adam_eps,
        step, decay, GRID,
    )  # fmt: skip
    p2 = _step(
        p_ptr, m_ptr, v_ptr, i2, n, g2, middle, rest1, beta2, rest2, inverse_bias2, adam_eps,
        step, decay, GRID,
    )  # fmt: skip
    p3 = _step(
        p_ptr, m_ptr, v_ptr, i3, n, g3, middle, rest1, beta2, rest2, inverse_bias2, adam_eps,
        step, decay, GRID,
    )  # fmt: skip
    store(
        p_ptr, n, i0, i1, i2, i3, p0, p1, p2, p3, block, stream, seed, round_draw, NORMAL, ROUNDS
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
) -> None:
    """One launch a parameter. The arguments are those of the op, checked; params contiguous."""
    states, terms = (exp_avgs, exp_avg_sqs), (streams, seed, draws, coeffs)
    launch(_zo_adam__kernel, params, states, *terms, hyper, kind, quanta, round_draw)
