# SPDX-License-Identifier: Apache-2.0
"""The noise contract over 10^8 elements, and the distribution of the normal."""

import math

import numpy as np
import pytest

from zo_kernels import _native, rng
from zo_kernels._registry import cpp_available

C = _native.binding()
ELEMENTS, CHUNK = 10**8, 4 * 10**6
WHERE = {"seed": 2**62 + 3, "draw": 2**33 + 1, "stream": 12}


@pytest.mark.parametrize("kind", rng.KINDS)
def test_a_hundred_million_elements_have_the_same_bits(kind):
    """All of them on every instruction set; numpy and torch on the first and last of each chunk."""
    if (reason := cpp_available()) is not None:
        pytest.skip(f"C++ is {reason}")
    before = C.cpu_isa()
    out = {isa: np.empty(CHUNK, np.float32) for isa in C.cpu_isas_available()}
    differing = 0
    try:
        for offset in range(0, ELEMENTS, CHUNK):
            for isa, z in out.items():
                C.set_isa(isa)
                C.noise_into(z, kind=kind, offset=offset, **WHERE)
            first, *others = (z.view(np.uint32) for z in out.values())
            differing += sum(np.count_nonzero(first != other) for other in others)
            for start in (0, CHUNK - 5000):
                place = WHERE | {"kind": kind, "offset": offset + start}
                for reference in (rng.noise_numpy(5000, **place), rng.noise(5000, **place).numpy()):
                    part = first[start : start + 5000]
                    differing += np.count_nonzero(reference.view(np.uint32) != part)
    finally:
        C.set_isa(before)
    assert differing == 0


def test_the_normal_passes_a_kolmogorov_smirnov_test():
    """Largest distance to the normal distribution function below the 1 % bound, for ten streams."""
    n = 10**5
    ranks = np.arange(1, n + 1) / n
    for stream in range(10):
        z = np.sort(rng.noise_numpy(n, seed=4, draw=2, stream=stream).astype(np.float64))
        cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z])
        distance = max((ranks - cdf).max(), (cdf - ranks + 1 / n).max())
        assert distance < 1.63 / math.sqrt(n)
