# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of the update ops share: noise, grid, rounding, and their launch.

z comes from Philox4x32-10, stream by stream, with the bits of `zo_kernels.rng`, whose text this
repeats, as the rest repeats `zo_kernels._arithmetic`: integers, and correctly rounded fp32
operations in the same order. So FUSED stays off: it would make fma of them.

A program has the elements of BLOCKS Philox blocks in four tensors, one for each output of a block:
[BLOCKS] normals each, or [BLOCKS, 32] signs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels import rng
from zo_kernels._arithmetic import LARGEST, SMALLEST_NORMAL
from zo_kernels.kernels._noise import noise, words

FUSED = False
BLOCKS = {"normal": 256, "rademacher": 16}  # Philox blocks of a program
WARPS = 4
# Change from call to call without a new kernel.
RUNTIME = ["n", "seed", "stream", "terms", "round_draw"]

_UNITS = tl.constexpr(2.0**40)
_BF16_LARGEST, _FP16_LARGEST = (tl.constexpr(LARGEST[x]) for x in ("bfloat16", "float16"))
_SMALLEST_NORMAL = tl.constexpr(SMALLEST_NORMAL)


@triton.jit
def elements(NORMAL: tl.constexpr, BLOCKS: tl.constexpr):
    """The blocks of this program, and the elements that are their outputs."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    STEP: tl.constexpr = 16 if NORMAL else 32  # from one output of a block to the next
    if NORMAL:
        i = (block // 16) * 64 + block % 16  # [BLOCKS]
    else:
        block = block[:, None]
        i = block * 128 + tl.arange(0, 32)[None, :]  # [BLOCKS, 32]
    return block, i, i + STEP, i + 2 * STEP, i + 3 * STEP


@triton.jit
def load(ptr, i, n):
    return tl.load(ptr + i, i < n).to(tl.float32)


@triton.jit
def snap(x, middle, GRID: tl.constexpr):
    if GRID:
        x = (x + middle) - middle
    return x


@triton.jit
def accumulate(
    t0, t1, t2, t3, block, stream, seed, draws_ptr, factors_ptr, terms, middle,
    NORMAL: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """t + factor * z, term by term; equal draws next to each other share one z."""
    z0, z1, z2, z3 = t0, t1, t2, t3
    last = seed * 0
    for j in range(terms):
        draw = tl.load(draws_ptr + j)
        factor = tl.load(factors_ptr + j)
        if (j == 0) | (draw != last):
            z0, z1, z2, z3 = noise(block, stream, draw, seed, NORMAL)
        last = draw
        t0 += snap(factor * z0, middle, GRID)
        t1 += snap(factor * z1, middle, GRID)
        t2 += snap(factor * z2, middle, GRID)
        t3 += snap(factor * z3, middle, GRID)
    return t0, t1, t2, t3


@triton.jit
def _round_bits(block, stream, draw, seed, NORMAL: tl.constexpr):
    """16 bits for each element, as a normal or a sign has it in the same place."""
    if NORMAL:
        w0, w1, w2, w3 = words(block // 32 * 16 + block % 16, stream, draw, seed)
        shift = (block // 16 % 2 * 16).to(tl.uint32)
        r0, r1, r2, r3 = w0 >> shift, w1 >> shift, w2 >> shift, w3 >> shift
    else:
        bit = tl.arange(0, 32)[None, :]
        w0, w1, w2, w3 = words(block * 16 + bit % 16, stream, draw, seed)
        first, second = tl.where(bit < 16, w0, w1), tl.where(bit < 16, w2, w3)
        r0, r1, r2, r3 = first, second, first >> 16, second >> 16
    return r0 & 0xFFFF, r1 & 0xFFFF, r2 & 0xFFFF, r3 & 0xFFFF


@triton.jit
def _store(ptr, i, n, x):
    tl.store(ptr + i, x.to(ptr.dtype.element_ty), i < n)


@triton.jit
def _store_randomly(ptr, i, n, x, r):
    dtype: tl.constexpr = ptr.dtype.element_ty
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if dtype == tl.bfloat16:
        rounded = (bits + r) >> 16
        in_range = magnitude <= _BF16_LARGEST
    else:
        is_small = magnitude < _SMALLEST_NORMAL
        small = tl.where(is_small, magnitude, 0).to(tl.float32, bitcast=True)
        subnormal = ((small * _UNITS).to(tl.int32).to(tl.uint32) + r) >> 16
        normal = (magnitude + (r >> 3) - 0x38000000) >> 13
        rounded = tl.where(is_small, subnormal, normal) | ((bits >> 16) & 0x8000)
        in_range = magnitude <= _FP16_LARGEST
    random = rounded.to(tl.uint16).to(dtype, bitcast=True)
    tl.store(ptr + i, tl.where(in_range, random, x.to(dtype)), i < n)


@triton.jit
def store(
    ptr, n, i0, i1, i2, i3, x0, x1, x2, x3, block, stream, seed, round_draw,
    NORMAL: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Rounded to the dtype behind `ptr`: by random bits, or to the nearest."""
    if ROUNDS:
        r0, r1, r2, r3 = _round_bits(block, stream, round_draw, seed, NORMAL)
        _store_randomly(ptr, i0, n, x0, r0)
        _store_randomly(ptr, i1, n, x1, r1)
        _store_randomly(ptr, i2, n, x2, r2)
        _store_randomly(ptr, i3, n, x3, r3)
    else:
        _store(ptr, i0, n, x0)
        _store(ptr, i1, n, x1)
        _store(ptr, i2, n, x2)
        _store(ptr, i3, n, x3)


def launch(
    kernel: Any,
    params: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    factors: Tensor,
    hyper: Tensor,
    kind: str,
    quanta: Tensor | None,
    round_draw: int | None,
    **constants: Any,
) -> None:
    """One launch a parameter of `kernel(p, *states, draws, factors, ..., *hyper, constants)`."""
    if not params:
        return
    device = params[0].device
    terms = torch.tensor(draws, dtype=torch.int64).to(device), factors.to(device)
    blocks, step = BLOCKS[kind], rng.GROUP[kind] // rng.BLOCKS_PER_GROUP[kind]
    quantum = [0.0] * len(params) if quanta is None else quanta.tolist()
    numbers = hyper.reshape(-1).tolist()
    for i, (p, stream) in enumerate(zip(params, streams, strict=True)):
        fp32 = p.dtype == torch.float32
        if n := p.numel():
            with torch.cuda.device_of(p):
                kernel[(triton.cdiv(n, blocks * step),)](
                    *(p, *(x[i] for x in states), *terms, n, seed, stream, len(draws)),
                    *(round_draw or 0, 1.5 * 2.0**23 * quantum[i], *numbers),
                    NORMAL=kind == "normal",
                    GRID=fp32 and quantum[i] != 0,
                    ROUNDS=not fp32 and round_draw is not None,
                    BLOCKS=blocks,
                    **constants,
                    num_warps=WARPS,
                    enable_fp_fusion=FUSED,
                )
