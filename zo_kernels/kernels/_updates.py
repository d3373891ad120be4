# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of the update ops share: noise, grid, rounding, and their launch.

z comes from Philox4x32-10, stream by stream, with the bits of `zo_kernels.rng`, whose text this
repeats, as the rest repeats `zo_kernels._arithmetic`: integers, and correctly rounded fp32
operations in the same order. So FUSED stays off: it would make fma of them.

A tile is the elements of BLOCKS Philox blocks, in four tensors, one for each output of a block:
[BLOCKS] normals each, or [BLOCKS, 32] signs. A program takes tile after tile of its chunk; one
launch takes all tensors of a dtype (see `_table`). Offsets are int64 from a tensor to its tile, and
small ones within. The last tile of a tensor has loads and stores of its own: with a mask that may
end anywhere, the compiler can't make them wide.

What changes from step to step is read from the device: draws, factors and hyperparameters. The
launcher uploads them in one copy that nobody waits for.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels import _env, _native, rng
from zo_kernels._arithmetic import LARGEST, SMALLEST_NORMAL
from zo_kernels.kernels import _table
from zo_kernels.kernels._noise import noise, words

FUSED = False
BLOCKS = {"normal": 256, "rademacher": 16}  # Philox blocks of a tile
WARPS = 4
# Change from call to call without a new kernel.
RUNTIME = ["seed", "terms", "tiles"]
UNALIGNED = ["rows_ptr", "chunks_ptr", "base_ptr", "draws_ptr", "factors_ptr", "hyper_ptr"]
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_UNITS = tl.constexpr(2.0**40)
_BF16_LARGEST, _FP16_LARGEST = (tl.constexpr(LARGEST[x]) for x in ("bfloat16", "float16"))
_SMALLEST_NORMAL = tl.constexpr(SMALLEST_NORMAL)


@triton.jit
def elements(tile, n, NORMAL: tl.constexpr, BLOCKS: tl.constexpr):
    """Of a tile: its blocks, where it starts, the elements that it has if it is the last one, else
    0, and where in it the four outputs of a block lie."""
    at = tl.arange(0, BLOCKS)  # [BLOCKS]
    block = (tile * BLOCKS).to(tl.uint32) + at.to(tl.uint32)
    STEP: tl.constexpr = 16 if NORMAL else 32  # from one output of a block to the next
    TILE: tl.constexpr = 4 * BLOCKS if NORMAL else 128 * BLOCKS
    if NORMAL:
        i = (at // 16) * 64 + at % 16  # [BLOCKS]
    else:
        block = block[:, None]
        i = at[:, None] * 128 + tl.arange(0, 32)[None, :]  # [BLOCKS, 32]
    start = tile * TILE
    short = tl.where(n - start < TILE, n - start, 0).to(tl.int32)
    return block, start, short, i, i + STEP, i + 2 * STEP, i + 3 * STEP


@triton.jit
def load(ptr, i0, i1, i2, i3, short):
    if short == 0:
        x0, x1, x2, x3 = tl.load(ptr + i0), tl.load(ptr + i1), tl.load(ptr + i2), tl.load(ptr + i3)
    else:
        x0, x1 = tl.load(ptr + i0, i0 < short), tl.load(ptr + i1, i1 < short)
        x2, x3 = tl.load(ptr + i2, i2 < short), tl.load(ptr + i3, i3 < short)
    return x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)


@triton.jit
def write(ptr, i0, i1, i2, i3, short, x0, x1, x2, x3):
    if short == 0:
        tl.store(ptr + i0, x0)
        tl.store(ptr + i1, x1)
        tl.store(ptr + i2, x2)
        tl.store(ptr + i3, x3)
    else:
        tl.store(ptr + i0, x0, i0 < short)
        tl.store(ptr + i1, x1, i1 < short)
        tl.store(ptr + i2, x2, i2 < short)
        tl.store(ptr + i3, x3, i3 < short)


@triton.jit
def snap(x, middle, GRID: tl.constexpr):
    if GRID:
        x = (x + middle) - middle
    return x


@triton.jit
def accumulate(
    t0, t1, t2, t3, block, stream, seed, base_ptr, draws_ptr, factors_ptr, terms, middle,
    NORMAL: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """t + factor * z, term by term; equal draws next to each other share one z."""
    z0, z1, z2, z3 = t0, t1, t2, t3
    base = tl.load(base_ptr)
    last = base
    for j in range(terms):
        draw = base + tl.load(draws_ptr + j)
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
def _randomly(x, r, dtype: tl.constexpr):
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
    return tl.where(in_range, random, x.to(dtype))


@triton.jit
def store(
    ptr, i0, i1, i2, i3, short, x0, x1, x2, x3, block, stream, seed, base_ptr, round_draw_ptr,
    NORMAL: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Rounded to the dtype behind `ptr`: by random bits, or to the nearest."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if ROUNDS:
        round_draw = tl.load(base_ptr) + tl.load(round_draw_ptr)
        r0, r1, r2, r3 = _round_bits(block, stream, round_draw, seed, NORMAL)
        x0, x1 = _randomly(x0, r0, dtype), _randomly(x1, r1, dtype)
        x2, x3 = _randomly(x2, r2, dtype), _randomly(x3, r3, dtype)
    x0, x1, x2, x3 = x0.to(dtype), x1.to(dtype), x2.to(dtype), x3.to(dtype)
    write(ptr, i0, i1, i2, i3, short, x0, x1, x2, x3)


class Numbers(NamedTuple):
    """What a launch reads from its device.

    Attributes:
        base: int64 [1], added to every draw.
        draws: int64 [T + 1], the last one that of the rounding.
        factors: fp32 [T].
        hyper: fp32.
    """

    base: Tensor
    draws: Tensor
    factors: Tensor
    hyper: Tensor


def _upload(draws: Sequence[int], factors: Tensor, hyper: Tensor, device: torch.device) -> Numbers:
    """In one copy that the host does not wait for: CUDA has staged it when the call returns."""
    floats = torch.cat([factors, hyper.reshape(-1), factors.new_zeros(1)])
    floats = floats[: len(floats) // 2 * 2].view(torch.int64)
    whole = torch.cat([torch.tensor([0, *draws], dtype=torch.int64), floats])
    whole = whole.to(device, non_blocking=True)
    integers, floats = whole[: 1 + len(draws)], whole[1 + len(draws) :].view(torch.float32)
    return Numbers(integers[:1], integers[1:], floats[: len(factors)], floats[len(factors) :])


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
    at: tuple[Tensor, Tensor] | None,
    **constants: Any,
) -> None:
    """One launch of `kernel` for all parameters that have a dtype, a grid or not, and addresses
    that are multiples of 16 or not: one or two, as a rule.

    at: `base` and `draws` of `Numbers`, where they and all other numbers lie on the device already.
    """
    if not params:
        return
    if at is None:
        numbers = _upload([*draws, round_draw or 0], factors, hyper, params[0].device)
    else:
        numbers = Numbers(*at, factors, hyper)
    quantum = [0.0] * len(params) if quanta is None else quanta.tolist()
    tile = BLOCKS[kind] * rng.GROUP[kind] // rng.BLOCKS_PER_GROUP[kind]
    cpp = _env.cuda_cpp()
    for part in _table.parts(params, states, streams, quantum, tile):
        rounds = part.dtype != torch.float32 and round_draw is not None
        with torch.cuda.device_of(params[0]):
            if cpp:
                _launch_cpp(
                    *(kernel.__name__, part, numbers, seed, len(draws), tile, kind, rounds),
                    sign=constants.get("SIGN", False),
                    buffer=bool(states),
                )
                continue
            kernel[(len(part.chunks),)](
                *(part.rows, part.chunks, *numbers, seed, len(draws), part.tiles),
                DTYPE=TYPES[part.dtype],
                ALIGNED=part.aligned,
                NORMAL=kind == "normal",
                GRID=part.grid,
                ROUNDS=rounds,
                BLOCKS=BLOCKS[kind],
                **constants,
                num_warps=WARPS,
                enable_fp_fusion=FUSED,
            )


def _launch_cpp(
    name: str, part: _table.Part, numbers: Numbers, seed: int, terms: int, tile: int, kind: str,
    rounds: bool, *, sign: bool, buffer: bool,
) -> None:  # fmt: skip
    """The same by csrc/cuda, as `_env.cuda_cpp` asks.

    Raises:
        RuntimeError: it was not built.
    """
    _native.require_cuda()
    torch.ops.zo_kernels._update_table(
        *(name.removeprefix("_").removesuffix("_kernel"), part.rows, part.chunks, *numbers),
        *(seed, terms, tile, part.tiles, kind, list(TYPES).index(part.dtype)),
        *(part.grid, rounds, part.aligned, sign, buffer),
    )
