# SPDX-License-Identifier: Apache-2.0
"""The ops on a GPU, beside what torch does there, as shares of what the GPU was measured to do.

    python -m benchmarks.gpu_ops [--out FILE] [--tiny]

Peaks are measured in the same run: the rate of a copy (bytes read and written), bf16 by
`torch.matmul` and int8 by `torch._int_mm`, both at 8192^3. Times are medians with the 20th and the
80th percentile, caches flushed (`triton.testing.do_bench`). A row of ours is refused unless its
result has the bits of the reference; other libraries have rows on some shapes, where they are
installed. Without a GPU it says so and ends; `--tiny` runs tiny shapes
through the same code there, as the tests do.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_products import CONV, LINEAR, PEERED, SMALL, conv, linear
from benchmarks.gpu_table import Candidate, record, table, timed
from benchmarks.timing import machine
from zo_kernels._registry import OPS, use_backend
from zo_kernels.ops import add_noise_
from zo_kernels.testing import assert_same_bits

OUT = Path("benchmarks/results/gpu_ops.json")
TITLE = "Ops on a GPU"


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    elements: int
    peak: int
    linear: Sequence[tuple[str, int, int, int]]
    small: Sequence[tuple[int, int, int]]
    peered: Sequence[tuple[int, int, int]]
    conv: Sequence[tuple[str, int, int, int, int, int]]


FULL = Sizes(2**28, 8192, LINEAR, SMALL, PEERED, CONV)
TINY = Sizes(
    *(1000, 64, (("tiny", 32, 64, 64),), ((1, 64, 64),), ((32, 64, 64),)),
    (("tiny", 1, 32, 32, 4, 3),),
)


def unavailable() -> str | None:
    """None, or why nothing is measured here."""
    return None if torch.cuda.is_available() else "torch finds no GPU; --tiny runs on the CPU"


def peaks(size: int, elements: int, device: str) -> dict[str, float]:
    """Bytes or operations a second."""
    x = torch.zeros(elements, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    half = torch.randn(size, size, device=device).bfloat16()
    codes = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
    twice = 2.0 * size**3
    calls: dict[str, tuple[float, Callable[[], object]]] = {
        "copy": (8.0 * elements, lambda: y.copy_(x)),
        "bf16": (twice, lambda: half @ half.T),
        "int8": (twice, lambda: torch._int_mm(codes, codes.T)),
    }
    return {name: work / timed(call, device)[0] * 1e3 for name, (work, call) in calls.items()}


def noise(elements: int, device: str) -> Iterator[Candidate]:
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.zeros(elements, dtype=dtype, device=device)
        work, short = 2.0 * elements * dtype.itemsize, str(dtype).removeprefix("torch.")
        for kind in ("rademacher", "normal"):
            name = f"add_noise_ {kind}, {short}"
            few = [torch.ones(4097, dtype=dtype, device=device) for _ in range(2)]
            add_noise_([few[0]], [0], 1, [0], [1e-3], kind=kind)
            with use_backend("reference"):
                add_noise_([few[1]], [0], 1, [0], [1e-3], kind=kind)
            assert_same_bits(*few)
            arguments = ([few[0]], [0], 1, [0], torch.ones(1), torch.tensor(1.0), kind)
            backend = OPS["add_noise_"].choose(arguments)
            yield Candidate(name, _noise_call(p, kind), work, "copy", backend)
        yield Candidate(f"torch.normal and add_, {short}", _by_torch(p), work, "copy")
    many = [torch.zeros(1 + elements // 2**16, device=device) for _ in range(1000)]
    streams, work = list(range(len(many))), 8.0 * sum(p.numel() for p in many)

    def call() -> None:
        add_noise_(many, streams, 1, [0], [1e-3], kind="rademacher")

    backend = OPS["add_noise_"].choose((many, streams, 1, [0], torch.ones(1), torch.tensor(1.0)))
    yield Candidate("add_noise_ rademacher, 1000 tensors", call, work, "copy", backend)


def _noise_call(p: Tensor, kind: str) -> Callable[[], object]:
    return lambda: add_noise_([p], [0], 1, [0], [1e-3], kind=kind)


def _by_torch(p: Tensor) -> Callable[[], object]:
    return lambda: p.add_(torch.randn_like(p), alpha=1e-3)


def tables(sizes: Sizes, measured: dict[str, float], device: str) -> Iterator[dict[str, Any]]:
    title = f"add_noise_, {sizes.elements / 1e6:.0f} M values"
    yield table(title, noise(sizes.elements, device), measured, device)
    for where, m, n, k in sizes.linear:
        title = f"qlinear, {where}: M={m} N={n} K={k}"
        peers = (m, n, k) in sizes.peered
        yield table(title, linear(m, n, k, device, peers=peers), measured, device)
    for m, n, k in sizes.small:
        title = f"qlinear, few rows: M={m} N={n} K={k}"
        peers = (m, n, k) in sizes.peered
        rows = linear(m, n, k, device, small=True, peers=peers)
        yield table(title, rows, measured, device)
    for where, batch, c, n, size, kernel in sizes.conv:
        title = f"qconv2d, {where}: {kernel}x{kernel} {c}->{n} at {size}x{size}, batch {batch}"
        yield table(title, conv(batch, c, n, size, kernel, device), measured, device)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.gpu_ops``; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_ops", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, wherever this runs")
    given = parser.parse_args(arguments)
    if not given.tiny and (why := unavailable()) is not None:
        print(f"nothing measured: {why}")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = TINY if given.tiny else FULL
    measured = peaks(sizes.peak, sizes.elements, device)
    facts = {f"peak, {name}": f"{rate / 1e12:.2f} Tera/s" for name, rate in measured.items()}
    print(machine() | facts, flush=True)
    record(
        "gpu_ops", TITLE, arguments, machine() | facts, tables(sizes, measured, device), given.out
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
