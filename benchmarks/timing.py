# SPDX-License-Identifier: Apache-2.0
"""Rows of a benchmark: candidates timed in turns, in one process, so that all see the same machine.

A busy moment then hits every candidate alike, and their ratios stay; the median leaves it out.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zo_kernels._files import atomic_write


@dataclass(frozen=True)
class Row:
    """One candidate: median, fastest and slowest of its rounds in milliseconds.

    ratio: median time over that of the floor, the least that the work can take.
    """

    name: str
    median_ms: float
    min_ms: float
    max_ms: float
    ratio: float


def in_turns(
    candidates: dict[str, Callable[[], object]],
    *,
    floor: str,
    rounds: int = 9,
    between: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Rows of ``candidates`` (name -> call), each called once a round after one warm-up call.

    floor: name of the candidate that the others are compared with; between: called before each
    round.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        between()
        for name, call in candidates.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            if number:  # the first is the warm-up
                times[name].append((time.perf_counter() - start) * 1e3)
    least = statistics.median(times[floor])
    return [
        Row(name, statistics.median(ms), min(ms), max(ms), statistics.median(ms) / least)
        for name, ms in times.items()
    ]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, object]:
    """What a row was measured on."""
    facts: dict[str, object] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def text_of(title: str, rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [f"**{title}**", "", "| | median ms | range | x floor |", "|---|---|---|---|"]
    lines += [
        f"| {r.name} | {r.median_ms:.1f} | {r.min_ms:.1f} to {r.max_ms:.1f} | {r.ratio:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def keep(path: Path, groups: Mapping[str, Sequence[Any]]) -> None:
    """Writes the rows (dataclasses) of all groups beside what they were measured on, as JSON."""
    rows = {title: [asdict(row) for row in rows] for title, rows in groups.items()}
    text = json.dumps({"machine": machine(), "groups": rows}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(text)
