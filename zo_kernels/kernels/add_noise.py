# SPDX-License-Identifier: Apache-2.0
"""`add_noise_` in Triton: p <- decay * p + sum_j scales[j] * z(seed, draws[j], stream, .).

p is fp32, bf16 or fp16 [n], row-major; draws int64 [T] and scales fp32 [T] lie on its device.
Traffic: one read and one write of p. z comes from Philox4x32-10, stream by stream, with the bits of
`zo_kernels.rng`, whose text this repeats: integers, and correctly rounded fp32 multiplications,
additions and square roots in the same order. So FUSED stays off: it would make fma of them.
Source: MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithm 1).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels import rng

FUSED = False
BLOCKS = {"normal": 256, "rademacher": 16}  # Philox blocks of a program
WARPS = 4

_M0, _M1 = (tl.constexpr(m) for m in rng.MULTIPLIERS)
_W0, _W1 = (tl.constexpr(w) for w in rng.WEYL)
_LOG, _SIN, _COS = tl.constexpr(rng.LOG), tl.constexpr(rng.SIN), tl.constexpr(rng.COS)
_MINUS_2_LN_2 = tl.constexpr(rng.MINUS_2_LN_2)
_SQRT_HALF_BITS = tl.constexpr(rng.SQRT_HALF_BITS)
_EXPONENT_32 = tl.constexpr(rng.EXPONENT_32)
_ANGLE_UNIT = tl.constexpr(2.0**-31)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):  # uint32, broadcast together
    for _ in tl.static_range(10):
        hi0, lo0 = tl.umulhi(c0, _M0), c0 * _M0
        hi1, lo1 = tl.umulhi(c2, _M1), c2 * _M1
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def _horner(COEFFICIENTS: tl.constexpr, N: tl.constexpr, x):
    y = x * COEFFICIENTS[N - 1] + COEFFICIENTS[N - 2]
    for i in tl.static_range(3, N + 1):
        y = y * x + COEFFICIENTS[N - i]
    return y


@triton.jit
def _radius(word):
    bits = (word | 1).to(tl.float32).to(tl.int32, bitcast=True)
    offset = bits - (_SQRT_HALF_BITS + _EXPONENT_32)
    exponent = (offset >> 23).to(tl.float32)
    t = ((offset & 0x7FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    return tl.sqrt_rn(exponent * _MINUS_2_LN_2 + t * _horner(_LOG, 8, t))


@triton.jit
def _pair(radius_word, angle_word):
    f = (angle_word << 2).to(tl.int32, bitcast=True).to(tl.float32) * _ANGLE_UNIT
    y = f * f
    sin = f * _horner(_SIN, 4, y)
    cos = _horner(_COS, 4, y)
    cos = tl.where((angle_word >> 31) == 1, -cos, cos)
    swap = ((angle_word >> 30) & 1) == 1
    radius = _radius(radius_word)
    return radius * tl.where(swap, sin, cos), radius * tl.where(swap, cos, sin)


@triton.jit
def _sign(word, bit):
    return (1 - 2 * ((word >> bit) & 1).to(tl.int32)).to(tl.float32)


@triton.jit(do_not_specialize=["n", "seed", "stream", "terms"])
def _add_noise__kernel(
    p_ptr,  # [n]
    draws_ptr,  # [terms]
    scales_ptr,  # [terms]
    n: tl.int64,
    seed: tl.int64,
    stream: tl.int64,
    terms: tl.int32,
    decay,
    NORMAL: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    bit = tl.arange(0, 32)[None, :].to(tl.uint32)
    STEP: tl.constexpr = 16 if NORMAL else 32  # from one output of a block to the next
    if NORMAL:
        i = (block // 16) * 64 + block % 16  # [BLOCKS]
    else:
        block = block[:, None]
        i = block * 128 + bit  # [BLOCKS, 32]
    m0, m1, m2, m3 = i < n, i + STEP < n, i + 2 * STEP < n, i + 3 * STEP < n
    p0 = decay * tl.load(p_ptr + i, m0).to(tl.float32)
    p1 = decay * tl.load(p_ptr + i + STEP, m1).to(tl.float32)
    p2 = decay * tl.load(p_ptr + i + 2 * STEP, m2).to(tl.float32)
    p3 = decay * tl.load(p_ptr + i + 3 * STEP, m3).to(tl.float32)
    for j in range(terms):
        draw = tl.load(draws_ptr + j)
        scale = tl.load(scales_ptr + j)
        w0, w1, w2, w3 = _philox(
            block.to(tl.uint32),
            stream.to(tl.uint32),
            draw.to(tl.uint32),
            (draw >> 32).to(tl.uint32),
            seed.to(tl.uint32),
            (seed >> 32).to(tl.uint32),
        )
        if NORMAL:
            z0, z1 = _pair(w0, w1)
            z2, z3 = _pair(w2, w3)
        else:
            z0, z1, z2, z3 = _sign(w0, bit), _sign(w1, bit), _sign(w2, bit), _sign(w3, bit)
        p0 += scale * z0
        p1 += scale * z1
        p2 += scale * z2
        p3 += scale * z3
    tl.store(p_ptr + i, p0.to(p_ptr.dtype.element_ty), m0)
    tl.store(p_ptr + i + STEP, p1.to(p_ptr.dtype.element_ty), m1)
    tl.store(p_ptr + i + 2 * STEP, p2.to(p_ptr.dtype.element_ty), m2)
    tl.store(p_ptr + i + 3 * STEP, p3.to(p_ptr.dtype.element_ty), m3)


def add_noise__triton(
    params: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    scales: Tensor,
    decay: Tensor,
    kind: str,
) -> None:
    """One launch a parameter. The arguments are those of the op, checked; params contiguous."""
    if not params:
        return
    device = params[0].device
    on_device = torch.tensor(draws, dtype=torch.int64).to(device), scales.to(device)
    blocks, step = BLOCKS[kind], rng.GROUP[kind] // rng.BLOCKS_PER_GROUP[kind]
    for p, stream in zip(params, streams, strict=True):
        if n := p.numel():
            with torch.cuda.device_of(p):
                _add_noise__kernel[(triton.cdiv(n, blocks * step),)](
                    *(p, *on_device, n, seed, stream, len(draws), decay.item()),
                    NORMAL=kind == "normal",
                    BLOCKS=blocks,
                    num_warps=WARPS,
                    enable_fp_fusion=FUSED,
                )
