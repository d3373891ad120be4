# SPDX-License-Identifier: Apache-2.0
"""How a product is cut into tiles: a pure function of its shape, which works untuned.

Not yet confirmed on a GPU: chosen by counting bytes and registers, not by timing.
"""

from typing import NamedTuple

MOST_SPLITS = 16
PROCESSORS = 132  # multiprocessors that should have work; an H200's. No device is asked
# Programs of few rows that each of them should have at least: a tile of 4-bit codes in groups of 64
# is 2 KB, four of them are on their way in a program, and an H200 needs some 25 KB on their way for
# each multiprocessor (4.3 TB/s times 0.8 us) to read as fast as it can.
FEW_PROGRAMS = 2


class Tiles(NamedTuple):
    """`m` rows of the output, `n` of the weight and `k` of each tile; how many programs share the
    k of a tile; warps of a program; tiles of a and of the weight on their way at a time."""

    m: int
    n: int
    k: int
    splits: int
    warps: int
    stages: int


def tiles(
    rows: int,
    n: int,
    taps: int,
    channels: int,
    groups: int,
    *,
    integer: bool,
    heavy: bool,
    splittable: bool,
) -> Tiles:
    """The tiles of a product, whatever the number of its perturbations: one has the same bits alone
    and among others, also where sums are floats.

    Args:
        rows: of the output, of one perturbation.
        n, taps, channels, groups: of the weight.
        integer: whether a is int8.
        heavy: whether a tile has two sums, or several products, which take their registers.
        splittable: whether sums may be joined from parts.
    """
    m = min(64 if heavy else 128, max(16, _power(rows)))
    few = m <= 32 and not heavy
    most = 128 if integer else 32 if heavy else 64
    k = _tile_k(taps, channels, groups, most, small=few)
    steps = groups if groups > 1 else taps * -(-channels // k)
    most_splits = min(MOST_SPLITS, max(1, steps // 4)) if few and splittable else 1
    wide = 64 if heavy or m <= 32 else 128
    while wide > 32 and -(-rows // m) * -(-n // wide) * most_splits < PROCESSORS:
        wide //= 2
    count = -(-rows // m) * -(-n // wide)
    wanted = PROCESSORS * (FEW_PROGRAMS if few else 1)
    splits = 1
    # A program keeps at least 4 steps, or its sums would be more traffic than its codes.
    while splittable and count * splits < wanted and steps >= 8 * splits < 8 * MOST_SPLITS:
        splits *= 2
    warps = 8 if m * wide >= 128 * 128 else 4
    return Tiles(m, wide, k, splits, warps, stages=4 if m <= 32 else 3)


def options(
    taps: int, channels: int, groups: int, *, heavy: bool, splittable: bool
) -> dict[str, tuple[int, ...]]:
    """What tuning may try for each field: all of it gives right results."""
    size = taps * channels // groups
    return {
        "splits": (1, 2, 4, 8, 16, 32) if splittable else (1,),
        "n": (32, 64, 128) if heavy else (32, 64, 128, 256),
        "m": (16, 32, 64) if heavy else (16, 32, 64, 128),
        "k": tuple(k for k in (32, 64, 128, 256) if groups == 1 or size % k == 0),
        "stages": (2, 3, 4, 5, 6),
        "warps": (4, 8),
    }


def _tile_k(taps: int, channels: int, groups: int, most: int, small: bool) -> int:
    """A power of two that divides a group; few rows leave room for longer tiles."""
    if groups > 1:
        size = taps * channels // groups
        return min(most, size & -size)
    return max(32, min(2 * most if small else most, _power(channels)))


def _power(x: int) -> int:
    """The least power of two from x on."""
    return 1 << max(0, x - 1).bit_length()
