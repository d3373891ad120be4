# SPDX-License-Identifier: Apache-2.0
"""`qlinear` and `qconv2d` on the shapes of Stable Diffusion 1.5's UNet, beside torch's own.

    python -m benchmarks.integer_ops [--quick]

Candidates of a shape take turns in one process. Shares are of the int8 peak, the best turn of the
whole run of a loop in registers; that loop takes its turn among the candidates too, and a share of
its own below 100 % says that the machine gave those rounds less. TOPS count a product and a sum as
two operations; rounding the activations costs time and counts as none.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import integer_candidates as kinds
from benchmarks import peak
from benchmarks.integer_candidates import Candidate
from benchmarks.quiet import QUIET, Disturbance, Hold, enough, pause, quietest
from benchmarks.sd15 import ConvShape, LinearShape, shapes
from benchmarks.timing import machine
from zo_kernels._files import atomic_write
from zo_kernels._registry import REFERENCE

SMALL = (12, 5120, 5120)  # rows, N, K
PEAK = "int8 peak"
SETTLE = 0.003  # seconds: idle threads of the last candidate's pool stop spinning
LEAST_MS = 8.0  # short calls repeat until a turn takes about this long


@dataclass(frozen=True)
class OpRow:
    """One candidate on one shape: milliseconds of a call, Tera-operations a second, and the share
    of the int8 peak (None where that cannot be measured)."""

    name: str
    backend: str
    median_ms: float
    min_ms: float
    max_ms: float
    tops: float
    of_peak: float | None
    error: float | None


@dataclass(frozen=True)
class Case:
    """A shape: its title, multiplications of a call, and what makes its candidates."""

    title: str
    kind: str
    macs: int
    make: Callable[[], list[Candidate]]


def cases(quick: bool, everything: bool) -> list[Case]:
    """What is measured, linear layers first."""
    linears, convs = shapes("sd15")
    chosen = [s for s in linears if s.m >= 64]
    chosen.append(LinearShape(4096, 1280, 1280, 0))
    pictures = [s for s in convs if min(s.c, s.n) > 4 and (everything or _telling(s))]
    if quick:
        chosen = [s for s in chosen if (s.m, s.n, s.k) in {(4096, 320, 320), (77, 1280, 768)}]
        pictures = [s for s in pictures if s.c == s.n == 1280 and s.size <= 16]
    made = [
        Case(
            f"linear M={s.m} N={s.n} K={s.k} ({s.layers} layers)",
            "linear",
            s.m * s.n * s.k,
            lambda s=s: kinds.linear(s),  # type: ignore[misc]
        )
        for s in chosen
    ]
    rows, n, k = SMALL
    title = f"linear M={rows} N={n} K={k}, weights from memory"
    made.append(Case(title, "small", rows * n * k, lambda: kinds.small(*SMALL, 2 if quick else 8)))
    made += [
        Case(
            f"conv {s.kernel}x{s.kernel} {s.c}->{s.n} at {s.size}x{s.size}"
            f"{'' if s.stride == 1 else ', stride 2'} ({s.layers} layers)",
            "conv",
            s.macs,
            lambda s=s: kinds.conv(s),  # type: ignore[misc]
        )
        for s in pictures
    ]
    return made


def _telling(shape: ConvShape) -> bool:
    """The shapes that make up most of the time, the smallest pictures, strides and 1x1."""
    if shape.kernel == 1:
        return shape.c == shape.n or (shape.size, shape.c) == (8, 2560)
    return shape.c == shape.n or shape.c in (1920, 2560) or (shape.size, shape.c) == (64, 640)


def measure(case: Case, rounds: int, threads: int, top: float | None) -> tuple[list[OpRow], float]:
    """The rows of one case, and the most that others disturbed its rounds. A reference, which is no
    kernel, is timed once. top: the int8 peak in TOPS, None if unknown. The loop that measures it
    runs in each round too: its own share tells what the machine gave these rounds."""
    made = case.make()
    loops = {} if peak.unavailable() else peak.loops(threads)
    calls = {c.name: c.call for c in made} | ({PEAK: loops["int8"]} if loops else {})
    slow = {c.name for c in made if c.backend == REFERENCE}
    repeats = {name: 1 if name in slow else _repeats(call) for name, call in calls.items()}
    attempts: list[tuple[float, dict[str, float]]] = []
    while not enough([share for share, _ in attempts], rounds):
        turn = {}
        disturbance = Disturbance()
        for name, call in calls.items():
            if name in slow and attempts:
                continue
            time.sleep(SETTLE)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            turn[name] = (time.perf_counter() - start) * 1e3 / repeats[name]
        attempts.append((disturbance.share(), turn))
        pause(attempts[-1][0])
    kept = quietest(rounds, attempts)
    once = attempts[0][1]
    times = {n: [once[n]] if n in slow else [turn[n] for turn in kept] for n in calls}
    disturbed = max(sorted(share for share, _ in attempts)[:rounds])
    rows = []
    for c in made:
        ms = statistics.median(times[c.name])
        tops = 2 * case.macs * c.work / ms / 1e9
        share = None if top is None else tops / top
        spread = min(times[c.name]), max(times[c.name])
        rows.append(OpRow(c.name, c.backend, ms, *spread, tops, share, c.error))
    if top is not None and PEAK in times:
        ms = statistics.median(times[PEAK])
        tops = peak.operations("int8", threads) / ms / 1e9
        spread = min(times[PEAK]), max(times[PEAK])
        rows.append(OpRow(PEAK, "", ms, *spread, tops, tops / top, None))
    return rows, disturbed


def share_of_best(groups: Sequence[dict[str, Any]], top: float, threads: int) -> float:
    """Make shares those of the best peak of all rounds, which it returns: what was measured before
    them, `top`, may have been measured while others had the cores."""
    peaks = [r["min_ms"] for group in groups for r in group["rows"] if r["name"] == PEAK]
    top = max([top, *(peak.operations("int8", threads) / ms / 1e9 for ms in peaks)])
    for row in (row for group in groups for row in group["rows"]):
        row["of_peak"] = row["tops"] / top
    return top


def _repeats(call: Callable[[], object]) -> int:
    call()
    start = time.perf_counter()
    call()
    return max(1, min(1000, round(LEAST_MS / 1e3 / (time.perf_counter() - start))))


def text_of(title: str, rows: Sequence[OpRow]) -> str:
    """The rows of a case as Markdown."""
    lines = [
        f"**{title}**",
        "",
        "| | backend | median ms | range | TOPS | of peak | rel. error |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        share = "" if r.of_peak is None else f"{r.of_peak:.0%}"
        error = "" if r.error is None else f"{r.error:.1e}"
        lines.append(
            f"| {r.name} | {r.backend} | {r.median_ms:.3f} | {r.min_ms:.3f} to {r.max_ms:.3f} "
            f"| {r.tops:.3f} | {share} | {error} |"
        )
    return "\n".join(lines) + "\n"


HOW_TO_READ = """w8a8: share of the int8 peak, rounding of activations included; alone: given the
codes. Then ratios of times: of another way over ours (above 1: ours is faster), of int4 over int8,
and with seeded noise on the codes over without.
"""
COLUMNS = (  # heading; of peak, or time of the first over that of the second
    ("w8a8", "w8a8", None),
    ("alone", kinds.ALONE, None),
    ("_int_mm / ours", kinds.INT_MM, "w8a8"),
    ("oneDNN / ours", kinds.ONEDNN, "w8a8"),
    ("fp32 / ours", kinds.FP32, "w8a8"),
    ("bf16 / ours", kinds.BF16, "w8a8"),
    ("w4a8 / w8a8", "w4a8", "w8a8"),
    ("w4a8-g64 / w8a8", "w4a8-g64", "w8a8"),
    ("noise / none", kinds.CODES, "w8a8"),
    ("pair / 2 x none", kinds.PAIR, "w8a8"),
)


def summary(groups: Sequence[dict[str, Any]]) -> str:
    """A line for each case: share of the peak, then ratios of times."""
    lines = [
        "| | " + " | ".join(heading for heading, _, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for group in groups:
        rows = {row["name"]: row for row in group["rows"]}
        cells = [_cell(rows, name, over) for _, name, over in COLUMNS]
        lines.append(f"| {group['title']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(rows: dict[str, dict[str, Any]], name: str, over: str | None) -> str:
    needed = [rows.get(n) for n in (name, over) if n is not None]
    if not all(needed):
        return ""
    first = needed[0]
    assert first is not None
    slow = "*" if any(row and row["backend"] == REFERENCE for row in needed) else ""
    if over is None:
        return "" if first["of_peak"] is None else f"{first['of_peak']:.0%}{slow}"
    work = 2 if name == kinds.PAIR else 1
    return f"{first['median_ms'] / work / rows[over]['median_ms']:.2f}{slow}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.integer_ops", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few shapes, three rounds")
    parser.add_argument("--all", action="store_true", help="every convolution of the UNet")
    parser.add_argument("--only", default="", help="cases whose title contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lock", type=Path, help="file to hold while timing (flock)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/integer_ops.json"))
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.integer_ops``; the exit code."""
    given = parse(arguments)
    threads = torch.get_num_threads()
    why = peak.unavailable()
    if why is not None:
        print(f"no share of the peak: {why}")
    rounds = min(given.rounds, 3) if given.quick else given.rounds
    top = None
    groups = []
    with Hold(given.lock) as hold, torch.no_grad():
        if why is None:
            top = peak.best("int8", threads)
            print(f"int8 peak: {top:.3f} TOPS\n")
        for case in cases(given.quick, given.all):
            if given.only not in case.title:
                continue
            hold.renew()
            rows, disturbed = measure(case, rounds, threads, top)
            print(text_of(case.title, rows), flush=True)
            if disturbed > QUIET:
                print(f"others took up to {disturbed:.0%} of the cores\n")
            kept = [asdict(row) for row in rows]
            about = {"title": case.title, "kind": case.kind, "disturbed": disturbed}
            groups.append(about | {"rows": kept})
    if top is not None:
        top = share_of_best(groups, top, threads)
        print(f"int8 peak, the best of the run: {top:.3f} TOPS\n")
    print(summary(groups))
    if any(row["backend"] == REFERENCE for group in groups for row in group["rows"]):
        print("* ran the reference, which is no kernel: its time says nothing.")
    words = sys.argv[1:] if arguments is None else list(arguments)
    content = {
        "command": shlex.join(["python", "-m", "benchmarks.integer_ops", *words]),
        "machine": machine() | {"int8 peak in TOPS": None if top is None else round(top, 3)},
        "groups": groups,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(given.out) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
