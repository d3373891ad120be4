# SPDX-License-Identifier: Apache-2.0
"""`zo_sgd_` in Triton: b <- momentum * b + g, p <- decay * p + step * b, or sign(b) for b.

p is fp32, bf16 or fp16 [n], b fp32 [n], row-major; draws int64 [T] and coeffs fp32 [T] lie on their
device. Traffic: one read and one write of p and of b; without a buffer, b is g and b_ptr is p_ptr,
unused. Noise and rounding: `zo_kernels.kernels._updates`.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._updates import RUNTIME, accumulate, elements, launch, load, snap, store


@triton.jit
def _step(
    p_ptr, b_ptr, i, n, g, middle, momentum, step, decay,
    SIGN: tl.constexpr, BUFFER: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    b = g
    if BUFFER:
        b = momentum * load(b_ptr, i, n) + g
        tl.store(b_ptr + i, b, i < n)
    if SIGN:
        b = (b > 0).to(tl.float32) - (b < 0).to(tl.float32)
    return snap(decay * load(p_ptr, i, n), middle, GRID) + snap(step * b, middle, GRID)


@triton.jit(do_not_specialize=RUNTIME)
def _zo_sgd__kernel(
    p_ptr,  # [n]
    b_ptr,  # [n]
    draws_ptr,  # [terms]
    coeffs_ptr,  # [terms]
    n: tl.int64,
    seed: tl.int64,
    stream: tl.int64,
    terms: tl.int32,
    round_draw: tl.int64,
    middle,
    momentum,
    step,
    decay,
    NORMAL: tl.constexpr,
    GRID: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIGN: tl.constexpr,
    BUFFER: tl.constexpr,
):
    block, i0, i1, i2, i3 = elements(NORMAL, BLOCKS)
    zero = tl.zeros(i0.shape, tl.float32)
    g0, g1, g2, g3 = accumulate(
        zero, zero, zero, zero, block, stream, seed, draws_ptr, coeffs_ptr, terms, middle,
        NORMAL, False,
    )  # fmt: skip
    p0 = _step(p_ptr, b_ptr, i0, n, g0, middle, momentum, step, decay, SIGN, BUFFER, GRID)
    p1 = _step(p_ptr, b_ptr, i1, n, g1, middle, momentum, step, decay, SIGN, BUFFER, GRID)
    p2 = _step(p_ptr, b_ptr, i2, n, g2, middle, momentum, step, decay, SIGN, BUFFER, GRID)
    p3 = _step(p_ptr, b_ptr, i3, n, g3, middle, momentum, step, decay, SIGN, BUFFER, GRID)
    store(
        p_ptr, n, i0, i1, i2, i3, p0, p1, p2, p3, block, stream, seed, round_draw, NORMAL, ROUNDS
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
) -> None:
    """One launch a parameter. The arguments are those of the op, checked; params contiguous."""
    states, terms = (buffers or params,), (streams, seed, draws, coeffs)
    constants: dict[str, Any] = {"SIGN": sign, "BUFFER": bool(buffers)}
    rest = (hyper, kind, quanta, round_draw)
    launch(_zo_sgd__kernel, params, states, *terms, *rest, **constants)
