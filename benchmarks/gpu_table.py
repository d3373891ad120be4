# SPDX-License-Identifier: Apache-2.0
"""Rows of the GPU benchmarks: what is timed, how a table shows it, and how tables are kept."""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_kernels._files import atomic_write

COLUMNS = ["", "backend", "median ms", "20 to 80 %", "rate", "of peak", "x bf16"]
BASELINE = "torch bf16"


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
    times = {c.name: timed(c.call, device) for c in kept if isinstance(c, Candidate)}
    rows = []
    for c in kept:
        if isinstance(c, Missing):
            rows.append([c.name, c.why, *[""] * (len(COLUMNS) - 2)])
            continue
        median, low, high = times[c.name]
        rate = c.work / median * 1e3
        unit = f"{rate / 1e9:.0f} GB/s" if c.peak == "copy" else f"{rate / 1e12:.1f} Tera/s"
        over = f"{times[BASELINE][0] / median:.2f}" if BASELINE in times else ""
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
