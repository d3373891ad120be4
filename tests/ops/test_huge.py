# SPDX-License-Identifier: Apache-2.0
"""A parameter of more than 2^31 elements, where offsets of 32 bits would go wrong."""

import ctypes
import mmap
import os
import sys

import pytest
import torch

from zo_kernels import rng
from zo_kernels.ops import add_noise_

NUMEL = 2**31 + 128
WINDOW = 1 << 22  # elements of memory that there are
WHERE = {"seed": 5, "draw": -3, "stream": 7, "kind": "rademacher"}
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000


@pytest.fixture
def folded():
    """bf16 [NUMEL] whose elements i and i + WINDOW are the same 2 bytes: 8 MiB, mapped often."""
    window, size = 2 * WINDOW, 2 * NUMEL
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    room = mmap.mmap(-1, -(-size // window) * window, mmap.MAP_PRIVATE | MAP_NORESERVE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    file = os.memfd_create("window")
    os.ftruncate(file, window)
    for at in range(start, start + len(room), window):
        flags = mmap.MAP_SHARED | MAP_FIXED
        assert libc.mmap(at, window, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0) == at
    os.close(file)
    yield torch.frombuffer(room, dtype=torch.bfloat16, count=NUMEL)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is mapped several times by Linux calls")
def test_offsets_have_64_bits(folded):
    """Every element is overwritten in turn, so that the memory holds what the last ones got."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in order
    try:
        add_noise_([folded], [7], 5, [-3], [1.0], decay=0.0, kind="rademacher")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(folded[:128].float(), rng.noise(128, offset=2**31, **WHERE))
    for at in (128, WINDOW // 2 + 1, WINDOW - 1000):
        wanted = rng.noise(1000, offset=2**31 - WINDOW + at, **WHERE)
        assert torch.equal(folded[at : at + 1000].float(), wanted)
