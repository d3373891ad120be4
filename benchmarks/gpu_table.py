# SPDX-License-Identifier: Apache-2.0
"""Rows of the GPU benchmarks: what is timed, how a table shows it, and how tables are kept."""

import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from zo_kernels._files import atomic_write

COLUMNS = ["", "backend", "median ms", "20 to 80 %", "rate", "of peak", "x bf16"]
BASELINE = "torch bf16"
T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """work: operations or bytes of a call, in the unit of `peak`, a key of the peaks."""

    name: str
    call: Callable[[], object]
    work: float
    peak: str
    backend: str = "torch"


@dataclass(frozen=True)
class Missing:
    """A candidate that does not run here, and why."""

    name: str
    why: str


def by_cpp(call: Callable[[], T]) -> Callable[[], T]:
    """The call, with the CUDA C++ kernels in place of Triton's."""

    def run() -> T:
        before = os.environ.get("ZO_CUDA_CPP", "0")
        os.environ["ZO_CUDA_CPP"] = "1"
        try:
            return call()
        finally:
            os.environ["ZO_CUDA_CPP"] = before

    return run


def timed(call: Callable[[], object], device: str) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, in milliseconds."""
    if device == "cuda":
        from triton.testing import do_bench

        median, low, high = do_bench(call, warmup=10, rep=60, quantiles=[0.5, 0.2, 0.8])
        return median, low, high
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), min(times), max(times)


def table(
    title: str, candidates: Iterable[Candidate | Missing], measured: dict[str, float], device: str
) -> dict[str, Any]:
    """As `benchmarks.report` prints it: share of the peak that a row is limited by, and how many
    times faster than torch bf16."""
    kept = list(candidates)
    times = [timed(c.call, device) if isinstance(c, Candidate) else (0.0,) * 3 for c in kept]
    baseline = next((t[0] for t, c in zip(times, kept, strict=True) if c.name == BASELINE), None)
    rows = []
    for (median, low, high), c in zip(times, kept, strict=True):
        if isinstance(c, Missing):
            rows.append([c.name, c.why, *[""] * (len(COLUMNS) - 2)])
            continue
        rate = c.work / median * 1e3
        unit = f"{rate / 1e9:.0f} GB/s" if c.peak == "copy" else f"{rate / 1e12:.1f} Tera/s"
        over = "" if baseline is None else f"{baseline / median:.2f}"
        share = f"{rate / measured[c.peak]:.0%} of {c.peak}"
        spread = f"{low:.4f} to {high:.4f}"
        rows.append([c.name, c.backend, f"{median:.4f}", spread, unit, share, over])
    return {"title": title, "columns": COLUMNS, "rows": rows}


def record(
    name: str,
    title: str,
    arguments: Sequence[str] | None,
    facts: dict[str, Any],
    tables: Iterable[dict[str, Any]],
    out: Path,
) -> None:
    """Print tables as they come, and keep in `out` what there is, should the time run out.

    Args:
        name: of the module in `benchmarks` whose command this is.
        title: of its section in the report.
        arguments: of the command; None: those of the process.
        facts: about the machine.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    content: dict[str, Any] = {
        "title": title,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *words]),
        "machine": facts,
        "tables": [],
    }
    for one in tables:
        content["tables"].append(one)
        print(f"\n{one['title']}")
        for row in one["rows"]:
            print("  " + " | ".join(row), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
