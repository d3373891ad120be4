# SPDX-License-Identifier: Apache-2.0
"""Peak memory: of a call alone, and of the whole process all the same."""

import sys

import pytest
import torch

from persona.memory import human, peak_bytes, peak_of

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can begin a peak anew")
def test_the_peak_of_a_call():
    large, small = (
        peak_of(lambda size=size: torch.ones(size * MIB // 4).numel(), CPU) for size in (256, 1)
    )
    assert large[0] == 256 * MIB // 4
    assert large[1] - small[1] > 200 * MIB
    assert peak_bytes(CPU) >= large[1]


def test_sizes_are_read_by_people():
    assert [human(s) for s in (12, 1536, 5 * MIB)] == ["12 B", "1.5 KiB", "5.0 MiB"]
