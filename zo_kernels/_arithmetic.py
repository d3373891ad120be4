# SPDX-License-Identifier: Apache-2.0
"""What the update ops do to the elements of a parameter, in one text for torch and numpy.

Every step is one correctly rounded fp32 operation in this order, or an integer operation: the C++
and Triton kernels repeat it line by line. Values are fp32, factors are fp32 numbers as floats.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from zo_kernels import rng

# Up to these fp32 bits a number lies within the finite range of the dtype.
LARGEST = {"bfloat16": 0x7F7F0000, "float16": 0x477FE000}
SMALLEST_NORMAL = 0x38800000  # of fp16: 2^-14
LEAST_QUANTUM, LARGEST_QUANTUM = 2.0**-126, 2.0**100  # `snap` then stays within fp32

Terms = Iterable[tuple[float, Any]]  # factor and z


def terms(
    noise: Callable[..., Any], draws: Sequence[int], factors: Sequence[float]
) -> Iterator[tuple[float, Any]]:
    """Each factor with its z; equal draws next to each other share one."""
    for draw, run in groupby(zip(draws, factors, strict=True), key=lambda term: term[0]):
        z = noise(draw=draw)
        for _, factor in run:
            yield factor, z


def update(
    xp: Any,
    rule: Callable[..., Any],
    flat: Any,
    states: Sequence[Any],
    *,
    dtype: str,
    noise: Callable[..., Any],
    round_bits: Callable[..., Any],
    draws: Sequence[int],
    factors: Sequence[float],
    hyper: Sequence[float],
    quantum: float,
    round_draw: int | None,
) -> None:
    """One parameter in place, `rng.CHUNK` elements at a time.

    Args:
        rule: `add_noise`, `zo_sgd` or `zo_adam`.
        flat: the parameter, 1-D; states: what the rule keeps, of its length.
        noise, round_bits: make z and random bits from a count, `draw` and `offset`.
    """
    for start in range(0, len(flat), rng.CHUNK):
        piece, *kept = (x[start : start + rng.CHUNK] for x in (flat, *states))
        parts = terms(partial(noise, len(piece), offset=start), draws, factors)
        fp32 = dtype == "float32"
        total = rule(xp, xp.load(piece, dtype), parts, hyper, quantum if fp32 else 0.0, *kept)
        if fp32:
            piece[:] = total
        elif round_draw is None:
            piece.view(xp.int16)[:] = xp.nearest(total, dtype)
        else:
            bits = round_bits(len(piece), draw=round_draw, offset=start)
            piece.view(xp.int16)[:] = round_randomly(xp, total, bits, dtype)


def snap(x: Any, quantum: float) -> Any:
    """x on the grid of multiples of `quantum`, a power of two; 0 leaves it as it is.

    To the nearest, ties to even, for |x| < 2^22 quantum: there the sum has an ulp of one quantum
    and the difference is exact.
    """
    if not quantum:
        return x
    middle = 1.5 * 2.0**23 * quantum
    return (x + middle) - middle


def round_randomly(xp: Any, x: Any, r: Any, dtype: str) -> Any:
    """Bits of x in "bfloat16" or "float16", int16, rounded by the random 16-bit integers r.

    Up, away from zero, with a chance of the share of the way: the mean is x. The share is exact
    where it has at most 16 bits, else (fp16 below 2^-16) cut to 16. Beyond the largest finite
    number, and for inf and nan, the result is the nearest, as without r.
    """
    bits = xp.cast(x.view(xp.int32), xp.int64) & rng.WORD
    magnitude = bits & 0x7FFFFFFF
    if dtype == "bfloat16":
        rounded = (bits + r) >> 16
    else:
        is_small = magnitude < SMALLEST_NORMAL
        small = xp.cast(xp.where(is_small, magnitude, 0), xp.int32).view(xp.float32)
        subnormal = (xp.cast(small * 2.0**40, xp.int64) + r) >> 16  # in units of 2^-24
        normal = (magnitude + (r >> 3) - (112 << 23)) >> 13
        rounded = xp.where(is_small, subnormal, normal) | (bits >> 16 & 0x8000)
    in_range = magnitude <= LARGEST[dtype]
    return xp.where(in_range, xp.cast(rounded, xp.int16), xp.nearest(x, dtype))


def add_noise(xp: Any, p: Any, parts: Terms, hyper: Sequence[float], quantum: float) -> Any:
    """New p. hyper: (decay,)."""
    total = snap(hyper[0] * p, quantum)
    for factor, z in parts:
        total = total + snap(factor * z, quantum)
    return total


def gradient(xp: Any, p: Any, parts: Terms) -> Any:
    """0 + factor z + factor z + ..., of the shape of p."""
    total = xp.zeros_like(p)
    for factor, z in parts:
        total = total + factor * z
    return total


def sgd_hyper(lr: float, momentum: float, weight_decay: float) -> tuple[float, ...]:
    """`hyper` of `zo_sgd` in fp64."""
    return momentum, -lr, 1.0 - lr * weight_decay


def adam_hyper(
    step: int, lr: float, betas: tuple[float, float], adam_eps: float, weight_decay: float
) -> tuple[float, ...]:
    """`hyper` of `zo_adam` in fp64."""
    beta1, beta2 = betas
    inverse_bias2, change = 1 / (1 - beta2**step), -lr / (1 - beta1**step)
    return 1 - beta1, beta2, 1 - beta2, inverse_bias2, adam_eps, change, 1 - lr * weight_decay


def zo_sgd(
    xp: Any,
    p: Any,
    parts: Terms,
    hyper: Sequence[float],
    quantum: float,
    buffer: Any = None,
    sign: bool = False,
) -> Any:
    """New p; `buffer` is updated in place. hyper: (momentum, step, decay)."""
    momentum, step, decay = hyper
    b = gradient(xp, p, parts)
    if buffer is not None:
        b = momentum * buffer + b
        buffer[:] = b
    if sign:
        b = xp.cast(b > 0, xp.float32) - xp.cast(b < 0, xp.float32)
    return snap(decay * p, quantum) + snap(step * b, quantum)


def zo_adam(
    xp: Any,
    p: Any,
    parts: Terms,
    hyper: Sequence[float],
    quantum: float,
    exp_avg: Any,
    exp_avg_sq: Any,
) -> Any:
    """New p; both moments are updated in place.

    hyper: (1 - beta1, beta2, 1 - beta2, 1 / (1 - beta2^t), adam_eps, -lr / (1 - beta1^t), decay).
    """
    rest1, beta2, rest2, inverse_bias2, adam_eps, step, decay = hyper
    g = gradient(xp, p, parts)
    m = exp_avg + rest1 * (g - exp_avg)
    v = beta2 * exp_avg_sq + rest2 * (g * g)
    exp_avg[:] = m
    exp_avg_sq[:] = v
    change = (m / (xp.sqrt(v * inverse_bias2) + adam_eps)) * step
    return snap(decay * p, quantum) + snap(change, quantum)
