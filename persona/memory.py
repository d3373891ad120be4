# SPDX-License-Identifier: Apache-2.0
"""Peak memory of this process: resident set on the CPU, allocator peak on a GPU."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from zo_kernels.ops import empty_cache
from zo_kernels.quant.convert import model_bytes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SMALL = 1 << 26  # bytes of a UNet below which `blocks_of_small_kept` acts
_earlier: dict[str, int] = {}  # device -> highest point before the peak began anew


def peak_bytes(device: torch.device) -> int:
    """Bytes at the highest point so far: of the whole process on the CPU, of torch on CUDA."""
    return max(_measured(device), _earlier.get(str(device), 0))


def resident_bytes() -> int:
    """What this process holds on the CPU now; where the system does not tell (not Linux), at its
    highest point."""
    return _status("VmRSS") or _measured(torch.device("cpu"))


@dataclass
class Peak:
    """The highest point of a block that has ended, in bytes."""

    bytes: int = 0


@contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """The highest point within the block; blocks may lie in one another.

    It includes what the process held before, and on the CPU memory that was freed but not given
    back. Where the system cannot begin anew (not Linux), it is the highest point so far.
    """
    peak, name = Peak(), str(device)
    before = peak_bytes(device)
    _earlier[name] = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    try:
        yield peak
    finally:
        peak.bytes = peak_bytes(device)
        _earlier[name] = max(before, peak.bytes)


def give_back_large_blocks() -> None:
    """Let every freed block of 256 KiB or more go back to the system at once, where the C
    library can (glibc); elsewhere do nothing.

    By default glibc soon keeps them, for speed, in a heap that fragments: a forward pass then holds
    more than its activations need. The price is that new pages are mapped again and again, but not
    for the ops of zo_kernels: their outputs have a pool of their own. Blocks of a small picture's
    size (8 x 8 latents of 1280 channels) are among those that fragment.
    `blocks_of_small_kept` is for where it costs more than it brings.
    """
    _mallopt(_M_MMAP_THRESHOLD, 1 << 18)


@contextmanager
def blocks_of_small_kept(unet: nn.Module) -> Iterator[None]:
    """Within the block, where a UNet has less than `SMALL` bytes, glibc keeps freed blocks up to
    32 MiB again, as it does by default after the first large ones; then `give_back_large_blocks`.

    For training: what a forward pass of so small a model leaves in the heap is little, and `trim`
    gives it back; new pages for each activation would take a good part of its time. Pictures, whose
    VAE has larger activations, are better drawn outside.
    """
    small = model_bytes(unet) < SMALL
    if small:
        _mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # the most that glibc takes
        _mallopt(_M_TRIM_THRESHOLD, 1 << 26)  # or the top of the heap would go back at each free
    try:
        yield
    finally:
        if small:
            _mallopt(_M_TRIM_THRESHOLD, 1 << 17)  # glibc's default
            give_back_large_blocks()
            trim()


def _mallopt(parameter: int, value: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)


def trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc); elsewhere do nothing.

    glibc keeps what a forward pass frees, in pieces that the next one fits only in part: without
    this a run on the CPU grows from forward to forward.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def trim_all(device: torch.device) -> None:
    """`trim`, and the caches that serve a forward pass after the other: for the end of a part of a
    run, after which other sizes come."""
    empty_cache()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim()


def _measured(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss where there is better: it begins with the size of the process that started this.
    if (highest := _status("VmHWM")) is not None:
        return highest
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int | None:
    """Bytes that Linux tells of this process; None on other systems."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def human(size: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return ""
