# SPDX-License-Identifier: Apache-2.0
"""What a step needs beside the weights, as the operating system counts it.

Each candidate runs in a process of its own, which has nothing but the weights: memory that an
earlier one gave back to the allocator would otherwise be used again unseen.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Make = Callable[[list[Tensor]], Callable[[], object]]  # weights -> a step over them
RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryRow:
    """One candidate: bytes of the weights, and how far the peak of a step lies above what the
    process held before it; on a GPU, of what torch allocated."""

    name: str
    weights: int
    extra: int


def unavailable(device: str) -> str | None:
    """None, or why the peak of a step cannot be told from that of the process."""
    if device == "cpu" and not RESET.exists():
        return "the peak of a process can be reset on Linux only"
    return None


def measure(
    candidates: dict[str, Make], shapes: Sequence[torch.Size], device: str
) -> list[MemoryRow]:
    """Rows of ``candidates`` (name -> a module's function): each makes a step over fp32 weights of
    ``shapes``, whose second call is measured."""
    rows = []
    for name, make in candidates.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            weights, extra = pool.apply(_extra, (make, [tuple(s) for s in shapes], device))
        rows.append(MemoryRow(name, weights, extra))
    return rows


def _extra(make: Make, shapes: Sequence[Sequence[int]], device: str) -> tuple[int, int]:
    params = [torch.full(tuple(shape), 0.5, device=device) for shape in shapes]
    step = make(params)
    step()
    if device == "cpu":
        RESET.write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        step()
        peak = _status("VmHWM")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated()
    return sum(p.nbytes for p in params), peak - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def text_of(title: str, rows: list[MemoryRow]) -> str:
    """The rows as Markdown."""
    lines = [f"**{title}**", "", "| | weights, MiB | beside them, MiB |", "|---|---|---|"]
    lines += [f"| {r.name} | {r.weights / 2**20:.0f} | {r.extra / 2**20:.2f} |" for r in rows]
    return "\n".join(lines) + "\n"
