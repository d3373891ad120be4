# SPDX-License-Identifier: Apache-2.0
"""`add_noise_` in Triton: p <- decay * p + sum_j scales[j] * z(seed, draws[j], stream, .).

p is fp32, bf16 or fp16 [n], row-major; draws int64 [T] and scales fp32 [T] lie on its device.
Traffic: one read and one write of p. Noise and rounding: `zo_kernels.kernels._updates`.
Source: MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithm 1).
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._updates import RUNTIME, accumulate, elements, launch, load, snap, store


@triton.jit(do_not_specialize=RUNTIME)
def _add_noise__kernel(
    p_ptr,  # [n]
    draws_ptr,  # [terms]
    scales_ptr,  # [terms]
    n: tl.int64,
    seed: tl.int64,
    stream: tl.int64,
    terms: tl.int32,
    round_draw: tl.int64,
    middle,
    decay,
    NORMAL: tl.constexpr,
    GRID: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block, i0, i1, i2, i3 = elements(NORMAL, BLOCKS)
    p0 = snap(decay * load(p_ptr, i0, n), middle, GRID)
    p1 = snap(decay * load(p_ptr, i1, n), middle, GRID)
    p2 = snap(decay * load(p_ptr, i2, n), middle, GRID)
    p3 = snap(decay * load(p_ptr, i3, n), middle, GRID)
    p0, p1, p2, p3 = accumulate(
        p0, p1, p2, p3, block, stream, seed, draws_ptr, scales_ptr, terms, middle, NORMAL, GRID
    )  # fmt: skip
    store(
        p_ptr, n, i0, i1, i2, i3, p0, p1, p2, p3, block, stream, seed, round_draw, NORMAL, ROUNDS
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
) -> None:
    """One launch a parameter. The arguments are those of the op, checked; params contiguous."""
    terms = (streams, seed, draws, scales)
    launch(_add_noise__kernel, params, (), *terms, decay, kind, quanta, round_draw)
