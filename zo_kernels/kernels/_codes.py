# SPDX-License-Identifier: Apache-2.0
"""Floats to int8 codes and a scale, in Triton: scale = largest / 127, codes = round(x * 127 / it).

Each step is one correctly rounded fp32 operation, so that the bits are those of the reference.
Largest magnitudes are compared by their bits: then nan is above infinity, and neither has codes.
"""

import triton
import triton.language as tl

_INFINITY = tl.constexpr(0x7F800000)
_SMALLEST = tl.constexpr(2.0**-100)
_MIDDLE = tl.constexpr(1.5 * 2.0**23)  # x + it - it rounds to the nearest, ties to even


@triton.jit
def magnitude(x):
    """Bits of |x|, int32: of two, the larger number has the larger ones."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def is_finite(largest):
    return largest < _INFINITY


@triton.jit
def usable(largest):
    return is_finite(largest) & (largest.to(tl.float32, bitcast=True) >= _SMALLEST)


@triton.jit
def scale_of(largest):
    value = largest.to(tl.float32, bitcast=True)
    scale = tl.where(usable(largest), tl.div_rn(value, 127.0), 0.0)
    return tl.where(is_finite(largest), scale, float("nan"))


@triton.jit
def codes_of(x, largest):
    """int8; `largest` is broadcast over x."""
    good = usable(largest)
    value = tl.where(good, largest.to(tl.float32, bitcast=True), 1.0)
    factor = tl.div_rn(127.0, value)
    rounded = (tl.where(good, x, 0.0) * factor + _MIDDLE) - _MIDDLE
    return rounded.to(tl.int32).to(tl.int8)
