# SPDX-License-Identifier: Apache-2.0
"""Peak memory of this process: resident set on the CPU, allocator peak on a GPU."""

import resource
import sys

import torch


def peak_bytes(device: torch.device) -> int:
    """Bytes at the highest point so far: of the whole process on the CPU, of torch on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def human(size: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return ""
