# SPDX-License-Identifier: Apache-2.0
"""Peak memory: of a call alone, and of the whole process all the same."""

import subprocess
import sys

import pytest
import torch

from persona.memory import human, peak_bytes, peak_of

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can begin a peak anew")
def test_the_peak_of_a_block():
    with peak_of(CPU) as outer:
        with peak_of(CPU) as large:
            torch.ones(64 * MIB)  # 256 MiB
        with peak_of(CPU) as small:
            torch.ones(MIB // 4)
    assert large.bytes - small.bytes > 200 * MIB
    assert outer.bytes >= large.bytes
    assert peak_bytes(CPU) >= outer.bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_does_not_begin_with_the_size_of_the_one_that_started_it():
    held = torch.ones(256 * MIB)  # 1 GiB
    program = (
        "import torch; from persona.memory import peak_bytes as p; print(p(torch.device('cpu')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < held.nbytes


HOLES = """
import torch
from pathlib import Path
from persona.memory import give_back_large_blocks
torch.ones(2**22)  # freed, it would make glibc keep all blocks up to its size
give_back_large_blocks()
blocks = [torch.ones(2**17 if i % 2 == 0 else 2**10) for i in range(400)]  # 512 KiB and 4 KiB
small = blocks[1::2]
pages = [int(Path("/proc/self/statm").read_text().split()[1])]
del blocks
pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
print((pages[0] - pages[1]) * 4096 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc, and reads /proc")
def test_freed_blocks_between_lasting_ones_go_back():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 90


FAULTS = """
import resource
import sys
import torch
from persona.memory import blocks_of_small_kept, give_back_large_blocks
give_back_large_blocks()
with blocks_of_small_kept(torch.nn.Linear(1024, int(sys.argv[1]), device="meta")):
    torch.ones(2**18)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(2**18)  # 256 pages
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc, and counts pages")
@pytest.mark.parametrize(("outputs", "kept"), [(8 * 1024, True), (32 * 1024, False)])
def test_pages_are_mapped_anew_for_large_models_only(outputs, kept):
    command = [sys.executable, "-c", FAULTS, str(outputs)]  # a UNet of 32 or 128 MiB
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 50 * 256 / 2) == kept


def test_sizes_are_read_by_people():
    assert [human(s) for s in (12, 1536, 5 * MIB)] == ["12 B", "1.5 KiB", "5.0 MiB"]
