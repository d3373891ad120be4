# SPDX-License-Identifier: Apache-2.0
"""The noise contract: `z(seed, draw, stream, i)` is a pure function with the same bits everywhere.

Words come from Philox4x32-10 (Salmon et al., SC'11). Key: the 64-bit `seed`, low word first.
Counter words: (block, stream, draw_lo, draw_hi). Nothing else enters: not the block size, the
thread count, the dtype, the device, or the order of the parameters.

| kind         | block of element i      | what it reads there                                   |
|--------------|-------------------------|-------------------------------------------------------|
| `normal`     | 16 * (i // 64) + i % 16 | output i // 16 % 4; by Box-Muller words (0, 1) make   |
|              |                         | outputs 0 and 1, words (2, 3) outputs 2 and 3         |
| `rademacher` | i // 128                | bit i % 32 of word i // 32 % 4: 0 is +1, 1 is -1      |
| `rounding`   | 16 * (i // 128) +       | the low half of word i // 16 % 4 where i // 64 % 2 is |
|              | i % 16                  | 0, else the high half: an integer in [0, 2^16)        |

So 16 consecutive blocks fill 64 consecutive normals, or 128 random roundings, and SIMD lanes never
have to be interleaved. The largest normal is 6.66 in magnitude. A stream ends where the 32-bit
block counter does, at 2^34 normals, 2^35 roundings or 2^39 signs.

The kinds read the same words. So a draw serves one purpose in a run: who rounds at random takes the
draw for it from the same counter as those of the noise, or the rounding would follow the noise.

Every step below is an integer operation, or one correctly rounded fp32 multiplication, addition or
square root in this order, never contracted to fma. That is what makes the bits portable; the C++
and Triton twins repeat it line by line. The same text runs on torch tensors and on numpy arrays.
This module needs numpy only; torch is imported by `noise`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zo_kernels._xp import Numpy as _Numpy
from zo_kernels._xp import torch_ as _torch

if TYPE_CHECKING:
    import torch

KINDS = ("normal", "rademacher")
ROUNDING = "rounding"
# Elements that a whole number of blocks fills.
GROUP = {"normal": 64, "rademacher": 128, ROUNDING: 128}
BLOCKS_PER_GROUP = {"normal": 16, "rademacher": 1, ROUNDING: 16}
MAX_ELEMENTS = {"normal": 2**34, "rademacher": 2**39, ROUNDING: 2**35}
CHUNK = 2**18  # elements at a time: scratch of a few MB, whatever the size of the parameter

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF

# Every constant is an fp32 number, written out in full.
# -2 log(1 + t) / t on [sqrt(1/2) - 1, sqrt(2) - 1], relative error 1.7e-7, constant term first.
LOG = (
    -1.9999998807907104,
    1.0000072717666626,
    -0.6667011976242065,
    0.4993981719017029,
    -0.39800330996513367,
    0.34501656889915466,
    -0.32445159554481506,
    0.20213796198368073,
)
MINUS_2_LN_2 = -1.3862943649291992
# sin(pi/4 f) / f and cos(pi/4 f) in powers of f^2 on [-1, 1], errors 3.3e-9 and 2.8e-8.
SIN = (0.7853981852531433, -0.08074543625116348, 0.00249000103212893, -3.59504520019982e-05)
COS = (1.0, -0.3084242641925812, 0.015849914401769638, -0.0003188805130776018)
SQRT_HALF_BITS = 0x3F3504F3
EXPONENT_32 = 32 << 23


def _mulhilo(a: int, b: Any) -> tuple[Any, Any]:
    """High and low word of a 64-bit product, in halves: int64 can't hold the whole of it."""
    low = a * (b & 0xFFFF)  # < 2^48
    high = a * (b >> 16) + (low >> 16)  # < 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: tuple[Any, Any, Any, Any], seed: int) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 of a counter.

    Args:
        counter: four words in [0, 2^32): ints, int64 tensors or int64 arrays, broadcast together.
        seed: the 64-bit key; taken modulo 2^64.

    Returns:
        Four words in [0, 2^32), carried like the counter.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        hi0, lo0 = _mulhilo(MULTIPLIERS[0], c0)
        hi1, lo1 = _mulhilo(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _horner(coefficients: Sequence[float], x: Any) -> Any:
    y = x * coefficients[-1] + coefficients[-2]
    for c in coefficients[-3::-1]:
        y = y * x + c
    return y


def _radius(xp: Any, word: Any) -> Any:
    """sqrt(-2 log u), u = (word | 1) / 2^32 rounded to fp32."""
    bits = xp.cast(word | 1, xp.float32).view(xp.int32)
    offset = bits - (SQRT_HALF_BITS + EXPONENT_32)
    exponent = xp.cast(offset >> 23, xp.float32)  # u = m 2^exponent, sqrt(1/2) <= m < sqrt(2)
    t = ((offset & 0x7FFFFF) + SQRT_HALF_BITS).view(xp.float32) - 1.0  # m - 1
    return xp.sqrt(exponent * MINUS_2_LN_2 + t * _horner(LOG, t))


def _direction(xp: Any, word: Any) -> tuple[Any, Any]:
    """A point on the unit circle: bits 0..29 an angle in [-pi/4, pi/4), bits 30, 31 the quarter."""
    f = xp.cast(((word << 2) & WORD) - ((word & (1 << 29)) << 3), xp.float32) * 2.0**-31
    y = f * f
    sin = f * _horner(SIN, y)
    cos = _horner(COS, y)
    cos = xp.where((word >> 31) == 1, -cos, cos)
    swap = ((word >> 30) & 1) == 1
    return xp.where(swap, sin, cos), xp.where(swap, cos, sin)


def _groups(xp: Any, group: Any, seed: int, draw: int, stream: int, kind: str) -> Any:
    """[groups, elements of a group], fp32 or int64, for int64 group numbers [groups]."""
    lanes = BLOCKS_PER_GROUP[kind]
    block = xp.stack([group * lanes + lane for lane in range(lanes)])  # [groups, lanes]
    words = philox4x32((block, stream, draw & WORD, (draw >> 32) & WORD), seed)
    if kind == "rademacher":
        bits = xp.stack([(word[:, 0] >> i) & 1 for word in words for i in range(32)])
        return xp.cast(1 - 2 * bits, xp.float32)
    if kind == ROUNDING:
        halves = [word & 0xFFFF for word in words] + [word >> 16 for word in words]
        return xp.stack(halves).reshape(-1, GROUP[kind])
    outputs = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = _radius(xp, radius_word)
        x, y = _direction(xp, angle_word)
        outputs += [radius * x, radius * y]
    return xp.stack(outputs).reshape(-1, GROUP[kind])


def _check(count: int, offset: int, stream: int, kind: str, kinds: Sequence[str]) -> None:
    if kind not in kinds:
        raise ValueError(f"noise: kind must be one of {kinds}, got {kind!r}; choose one")
    if not 0 <= stream <= WORD:
        raise ValueError(f"noise: stream must be in [0, 2^32), got {stream}; number from 0")
    if count < 0 or offset < 0 or offset + count > MAX_ELEMENTS[kind]:
        raise ValueError(
            f"noise: elements must lie in [0, {MAX_ELEMENTS[kind]}) for kind={kind!r}, got {count} "
            f"from {offset}; split the parameter into several streams"
        )


def noise_numpy(
    n: int, *, seed: int, draw: int, stream: int, kind: str = "normal", offset: int = 0
) -> np.ndarray:
    """`z(seed, draw, stream, i)` for i in [offset, offset + n) by plain numpy: fp32 [n].

    Arguments and errors are those of `noise`.
    """
    _check(n, offset, stream, kind, KINDS)
    return _fill_numpy(np.empty(n, np.float32), seed, draw, stream, kind, offset)


def round_bits_numpy(n: int, *, seed: int, draw: int, stream: int, offset: int = 0) -> np.ndarray:
    """16 random bits an element, as `round_bits` makes them, by plain numpy: int64 [n]."""
    _check(n, offset, stream, ROUNDING, (ROUNDING,))
    return _fill_numpy(np.empty(n, np.int64), seed, draw, stream, ROUNDING, offset)


def _fill_numpy(
    out: np.ndarray, seed: int, draw: int, stream: int, kind: str, offset: int
) -> np.ndarray:
    for start, stop, first, last, skip in _chunks(len(out), offset, kind):
        groups = np.arange(first, last, dtype=np.int64)
        values = _groups(_Numpy, groups, seed, draw, stream, kind).reshape(-1)
        out[start:stop] = values[skip : skip + stop - start]
    return out


def noise(
    shape: int | Sequence[int],
    *,
    seed: int,
    draw: int,
    stream: int,
    kind: str = "normal",
    offset: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """`z(seed, draw, stream, i)` for i in [offset, offset + numel), by plain torch operations.

    Args:
        shape: of the result; element i is counted in row-major order.
        seed: 64-bit number of the run; taken modulo 2^64, so int64 and uint64 spellings agree.
        draw: 64-bit number of the direction; likewise.
        stream: 32-bit number of the parameter.
        kind: "normal" or "rademacher" (+1 or -1).
        offset: index of the first element.
        device: where the result is made.

    Returns:
        fp32 tensor of `shape`.

    Raises:
        ValueError: unknown kind, stream out of range, or more elements than a stream has.
    """
    import torch

    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    _check(math.prod(shape), offset, stream, kind, KINDS)
    out = torch.empty(math.prod(shape), dtype=torch.float32, device=device)
    return _fill(out, seed, draw, stream, kind, offset).reshape(shape)


def round_bits(
    n: int,
    *,
    seed: int,
    draw: int,
    stream: int,
    offset: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """16 random bits for each of n elements, to round them with: int64 [n] in [0, 2^16).

    Arguments and errors are those of `noise`; `draw` must not be one that noise was taken from.
    """
    import torch

    _check(n, offset, stream, ROUNDING, (ROUNDING,))
    out = torch.empty(n, dtype=torch.int64, device=device)
    return _fill(out, seed, draw, stream, ROUNDING, offset)


def _fill(
    out: torch.Tensor, seed: int, draw: int, stream: int, kind: str, offset: int
) -> torch.Tensor:
    import torch

    for start, stop, first, last, skip in _chunks(len(out), offset, kind):
        groups = torch.arange(first, last, dtype=torch.int64, device=out.device)
        values = _groups(_torch(), groups, seed, draw, stream, kind).reshape(-1)
        out[start:stop] = values[skip : skip + stop - start]
    return out


def _chunks(n: int, offset: int, kind: str) -> Iterator[tuple[int, int, int, int, int]]:
    """Output range, group range, and how many elements of the first group lie before the output."""
    group = GROUP[kind]
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        first, skip = divmod(offset + start, group)
        yield start, stop, first, -(-(offset + stop) // group), skip
