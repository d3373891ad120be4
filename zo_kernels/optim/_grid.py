# SPDX-License-Identifier: Apache-2.0
"""The grid that makes probing fp32 weights in place exact.

(w + eps z) - eps z is not w: an fp32 sum rounds, and no memory-free way of adding can undo it. On a
grid it can. With w a multiple of a quantum q, and eps z rounded to a multiple of q before it is
added, every sum below 2^22 q is exact, so subtracting the same term gives back every bit, in any
order. The weight is then a fixed-point number of 23 bits: putting it on the grid, once, moves it by
at most q / 2, about 2^-22 of the largest weight of its tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

BITS = 22  # the rounding of the op is exact below 2^22 quanta
REACH = 8.0  # above the largest |z|
RECHECK = 1000  # steps between two looks, after the first ones, at how far the weights have grown


def look_at(step: int) -> bool:
    """Whether growth is looked at before step `step`: 0, each power of two, each RECHECK.

    Weights that grow at a steady pace from zero double between two powers of two, which is the room
    that `quantum` leaves them.
    """
    return step % RECHECK == 0 or step & (step - 1) == 0


def quantum(largest: float, eps: float) -> float:
    """The power of two that leaves |w| <= `largest`, its probes, and as much again of growth."""
    return 2.0 ** (math.ceil(math.log2(2 * (largest + REACH * eps))) - BITS)


def largest(p: Tensor) -> float:
    """max |p|, without a copy of p."""
    if not p.numel():
        return 0.0
    low, high = torch.aminmax(p.detach())
    return max(-low.item(), high.item())


def outgrown(p: Tensor, q: float, eps: float) -> bool:
    """Whether a probe of p could leave the exact range of its grid."""
    return largest(p) + REACH * eps >= 2.0**BITS * q


def quanta(params: Iterable[Tensor], eps: float) -> list[float]:
    """A quantum for each fp32 parameter, 0 for the others."""
    return [quantum(largest(p), eps) if p.dtype == torch.float32 else 0.0 for p in params]
