# SPDX-License-Identifier: Apache-2.0
"""How the Triton kernels of `qlinear` and `qconv2d` cut a product, untuned."""

import pytest

pytest.importorskip("triton")
from zo_kernels.kernels._tiles import FEW_PROGRAMS, PROCESSORS, tiles


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("integer", [False, True])
def test_tiles(integer, heavy):
    for rows in (1, 5, 77, 4096):
        for taps, channels, groups in ((1, 63, 1), (1, 4096, 64), (9, 320, 18), (1, 8192, 1)):
            shape = (rows, 640, taps, channels, groups)
            for splittable in (False, True):
                cut = tiles(*shape, integer=integer, heavy=heavy, splittable=splittable)
                assert all(size & (size - 1) == 0 for size in cut[:4])
                assert cut.m >= 16 and cut.n >= 32 and cut.k >= 32 and cut.n % 16 == 0
                assert groups == 1 or taps * channels // groups % cut.k == 0
                assert cut.splits == 1 or splittable
                blocks = -(-rows // cut.m) * -(-640 // cut.n)
                few = 1 if heavy or cut.m > 32 else FEW_PROGRAMS
                assert cut.splits == 1 or blocks * cut.splits < 2 * few * PROCESSORS


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (12288, 3072)])
def test_few_rows_have_programs_for_the_rate_of_memory(n, k):
    for rows in (1, 16):
        for integer, groups in ((False, k // 64), (True, 1)):
            kind = {"integer": integer, "heavy": False, "splittable": True}
            cut = tiles(rows, n, 1, k, groups, **kind)
            on_their_way = cut.n * cut.k // 2 * cut.stages  # bytes of 4-bit codes in a program
            programs = n // cut.n * cut.splits
            assert programs * on_their_way >= PROCESSORS * 20 * 1024
