# SPDX-License-Identifier: Apache-2.0
"""The noise contract in Triton: the bits of `zo_kernels.rng`, whose text this repeats.

Integers, and correctly rounded fp32 operations in the same order. So FUSED stays off in a launch
that makes normals: it would make fma of them.
"""

import triton
import triton.language as tl

from zo_kernels import rng

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
def words(block, stream, draw, seed):  # int64
    return _philox(
        block.to(tl.uint32),
        stream.to(tl.uint32),
        draw.to(tl.uint32),
        (draw >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


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
def _sign(word):  # [BLOCKS, 1] -> [BLOCKS, 32]
    bit = tl.arange(0, 32)[None, :].to(tl.uint32)
    return (1 - 2 * ((word >> bit) & 1).to(tl.int32)).to(tl.float32)


@triton.jit
def noise(block, stream, draw, seed, NORMAL: tl.constexpr):
    w0, w1, w2, w3 = words(block, stream, draw, seed)
    if NORMAL:
        z0, z1 = _pair(w0, w1)
        z2, z3 = _pair(w2, w3)
    else:
        z0, z1, z2, z3 = _sign(w0), _sign(w1), _sign(w2), _sign(w3)
    return z0, z1, z2, z3


@triton.jit
def _word(number, stream, draw, seed):
    """32 signs, where word w of block b is number 4 b + w, int64."""
    w0, w1, w2, w3 = words(number >> 2, stream, draw, seed)
    second = (number & 2) != 0
    even, odd = tl.where(second, w2, w0), tl.where(second, w3, w1)
    return tl.where((number & 1) != 0, odd, even)


@triton.jit
def noise_at(i, stream, draw, seed, NORMAL: tl.constexpr):
    """z of the elements i, int64, wherever they lie: fp32, at the price of a block each."""
    if NORMAL:
        w0, w1, w2, w3 = words(i // 64 * 16 + i % 16, stream, draw, seed)
        second = (i & 32) != 0
        z0, z1 = _pair(tl.where(second, w2, w0), tl.where(second, w3, w1))
        z = tl.where((i & 16) != 0, z1, z0)
    else:
        bit = _word(i >> 5, stream, draw, seed) >> (i & 31).to(tl.uint32)
        z = (1 - 2 * (bit & 1).to(tl.int32)).to(tl.float32)
    return z


@triton.jit
def sign_nibbles(
    first, stream, draw, seed, ROWS: tl.constexpr, LENGTH: tl.constexpr, ALIGNED: tl.constexpr
):
    """uint32 [ROWS, LENGTH / 4]: signs of the LENGTH elements from each of `first` on, int64
    [ROWS]; the lower four bits of a word are four signs, where 1 is -1, and the others anything.

    ALIGNED: what divides all of `first`. 128 takes a Philox block for 128 signs, 32 one for 32, 1
    two for 32.
    """
    if ALIGNED % 128 == 0 and LENGTH % 128 == 0:
        block = (first >> 7)[:, None] + tl.arange(0, LENGTH // 128)[None, :]
        w0, w1, w2, w3 = words(block, stream, draw, seed)
        bits = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, LENGTH // 32)
    else:
        number = (first >> 5)[:, None] + tl.arange(0, LENGTH // 32)[None, :]
        bits = _word(number, stream, draw, seed)
        if ALIGNED % 32 != 0:
            shift = (first & 31).to(tl.uint32)[:, None]
            after = _word(number + 1, stream, draw, seed)
            bits = (bits >> shift) | ((after << 1) << (31 - shift))
    nibble = tl.arange(0, 8)[None, None, :].to(tl.uint32)
    return (bits[:, :, None] >> (4 * nibble)).reshape(ROWS, LENGTH // 4)
