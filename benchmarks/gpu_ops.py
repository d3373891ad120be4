# SPDX-License-Identifier: Apache-2.0
"""The ops on a GPU, beside what torch does there, as shares of what the GPU was measured to do.

    python -m benchmarks.gpu_ops [--out FILE] [--tiny]

Peaks are measured in the same run: the rate of a copy (bytes read and written), bf16 by
`torch.matmul` and int8 by `torch._int_mm`, both at 8192^3. Times are medians with the 20th and the
80th percentile, caches flushed (`triton.testing.do_bench`). A row of ours is refused unless its
result has the bits of the reference. Without a GPU it says so and ends; `--tiny` runs tiny shapes
through the same code there, as the tests do.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.integer_candidates import Ours, which_backend
from benchmarks.timing import machine
from zo_kernels._files import atomic_write
from zo_kernels._registry import OPS, use_backend
from zo_kernels.ops import add_noise_, quantize_rows
from zo_kernels.testing import assert_same_bits

OUT = Path("benchmarks/results/gpu_ops.json")
TITLE = "Ops on a GPU"
COLUMNS = ["", "backend", "median ms", "20 to 80 %", "rate", "of peak", "x bf16"]
CHECKED = 64  # rows whose bits are compared: the reference multiplies in fp64
# Where they come from, M, N, K.
LINEAR = (
    ("square", 8192, 8192, 8192),
    ("SD1.5, attention", 4096, 320, 320),
    ("SDXL, attention", 4096, 1280, 1280),
    ("SDXL, feed forward in", 4096, 10240, 1280),
    ("SDXL, feed forward out", 4096, 1280, 5120),
    ("Flux, attention", 4096, 3072, 3072),
    ("Flux, feed forward in", 4096, 12288, 3072),
    ("Flux, feed forward out", 4096, 3072, 12288),
)
SMALL = ((1, 4096, 4096), (16, 4096, 4096), (1, 12288, 3072), (16, 12288, 3072))
# Pictures, channels, output channels, pixels, kernel.
CONV = (
    ("SD1.5", 2, 320, 320, 64, 3),
    ("SD1.5", 2, 640, 640, 32, 3),
    ("SD1.5", 2, 1280, 1280, 16, 3),
    ("SDXL", 2, 320, 320, 128, 3),
    ("SDXL", 2, 640, 640, 64, 3),
    ("SDXL", 2, 1280, 1280, 32, 3),
    ("SDXL", 2, 1920, 640, 64, 1),
)


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    elements: int
    peak: int
    linear: Sequence[tuple[str, int, int, int]]
    small: Sequence[tuple[int, int, int]]
    conv: Sequence[tuple[str, int, int, int, int, int]]


FULL = Sizes(2**28, 8192, LINEAR, SMALL, CONV)
TINY = Sizes(
    1000, 64, (("tiny", 32, 64, 64),), ((1, 64, 64),), (("tiny", 1, 32, 32, 4, 3),)
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """work: operations or bytes of a call, in the unit of `peak`, a key of the peaks."""

    name: str
    call: Callable[[], object]
    work: float
    peak: str
    backend: str = "torch"


def unavailable() -> str | None:
    """None, or why nothing is measured here."""
    return None if torch.cuda.is_available() else "torch finds no GPU; --tiny runs on the CPU"


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


def _bf16_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    return lambda: F.linear(x, weight, bias)


def linear(m: int, n: int, k: int, device: str, small: bool = False) -> Iterator[Candidate]:
    """Rows of one product, from bf16 to bf16; few rows are limited by the bytes of the weight."""
    x = torch.randn(m, k, device=device).bfloat16()
    weight, bias = torch.randn(n, k, device=device) / k**0.5, torch.randn(n, device=device)
    layer = Ours("qlinear", weight, bias.bfloat16())
    operations = 2.0 * m * n * k
    formats: list[tuple[str, str, dict[str, Any]]] = [
        ("w8a8", "w8a8", {}),
        ("w4a8-g64", "w4a8-g64", {}),
        ("w8a16", "w8a8", {"act_bits": 16}),
        ("w4a16-g64", "w4a8-g64", {"act_bits": 16}),
    ]
    formats.append(("w8a8, codes +1", "w8a8", _codes(1)))
    for name, stored, more in formats:
        call, few = layer.call(stored, x, **more), layer.call(stored, x[:CHECKED], **more)
        if more.get("act_bits") != 16:
            with use_backend("reference"):
                wanted = few()
            assert_same_bits(call()[: len(wanted)], wanted)
        bits = 8 if stored == "w8a8" else 4
        peak = "int8" if more.get("act_bits") != 16 else "bf16"
        work, peak = (n * k * bits / 8, "copy") if small else (operations, peak)
        yield Candidate(name, call, work, peak, which_backend("qlinear", call))
    half = _bf16_linear(x, weight.bfloat16(), bias.bfloat16())
    yield Candidate("torch bf16", half, 2.0 * n * k if small else operations, _peak(small, "bf16"))
    if m > 16:  # what torch._int_mm takes
        codes, _ = quantize_rows(x)
        other = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        yield Candidate("torch._int_mm alone", _int_mm(codes, other), operations, "int8")


def _int_mm(a: Tensor, b: Tensor) -> Callable[[], object]:
    return lambda: torch._int_mm(a, b.T)


def _peak(small: bool, otherwise: str) -> str:
    return "copy" if small else otherwise


def _codes(count: int) -> dict[str, Any]:
    noise = {"perturb": "codes", "seed": 1, "stream": 1, "headroom": 1}
    return noise | {"draws": list(range(count)), "coeffs": torch.ones(count)}


def conv(
    batch: int, c: int, n: int, size: int, kernel: int, device: str
) -> Iterator[Candidate]:  # fmt: skip
    x = torch.randn(batch, c, size, size, device=device).bfloat16()
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(n, c, kernel, kernel, device=device) / (c * kernel**2) ** 0.5
    bias = torch.randn(n, device=device).bfloat16()
    where = {"kernel_size": kernel, "padding": kernel // 2}
    layer = Ours("qconv2d", weight, bias, **where)
    work = 2.0 * batch * size**2 * n * c * kernel**2
    codes, x_scale = quantize_rows(x, per_sample=True)
    given = {"x_scale": x_scale, "out_dtype": torch.bfloat16}
    for name, stored, a, more in (
        ("w8a8", "w8a8", x, {}),
        ("w8a8, product alone", "w8a8", codes, given),
        ("w4a8-g64", "w4a8-g64", x, {}),
        ("w8a8, codes +1", "w8a8", x, _codes(1)),
    ):
        if stored not in layer.formats():
            continue
        call = layer.call(stored, a, **more)
        first = more | ({"x_scale": x_scale[:1]} if a is codes else {})
        with use_backend("reference"):
            wanted = layer.call(stored, a[:1], **first)()
        assert_same_bits(call()[:1].contiguous(), wanted.contiguous())
        yield Candidate(name, call, work, "int8", which_backend("qconv2d", call))
    half = weight.bfloat16().to(memory_format=torch.channels_last)
    yield Candidate("torch bf16", _bf16_conv(x, half, bias, kernel), work, "bf16")


def _bf16_conv(x: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> Callable[[], object]:
    return lambda: F.conv2d(x, weight, bias, padding=kernel // 2)


def table(
    title: str, candidates: Iterator[Candidate], measured: dict[str, float], device: str
) -> dict[str, Any]:
    """As `benchmarks.report` prints it: share of the peak that a row is limited by, and how many
    times faster than torch bf16."""
    kept = list(candidates)
    times = {c.name: timed(c.call, device) for c in kept}
    rows = []
    for c in kept:
        median, low, high = times[c.name]
        rate = c.work / median * 1e3
        unit = f"{rate / 1e9:.0f} GB/s" if c.peak == "copy" else f"{rate / 1e12:.1f} Tera/s"
        over = f"{times['torch bf16'][0] / median:.2f}" if "torch bf16" in times else ""
        share = f"{rate / measured[c.peak]:.0%} of {c.peak}"
        spread = f"{low:.4f} to {high:.4f}"
        rows.append([c.name, c.backend, f"{median:.4f}", spread, unit, share, over])
    return {"title": title, "columns": COLUMNS, "rows": rows}


def tables(sizes: Sizes, measured: dict[str, float], device: str) -> Iterator[dict[str, Any]]:
    title = f"add_noise_, {sizes.elements / 1e6:.0f} M values"
    yield table(title, noise(sizes.elements, device), measured, device)
    for where, m, n, k in sizes.linear:
        title = f"qlinear, {where}: M={m} N={n} K={k}"
        yield table(title, linear(m, n, k, device), measured, device)
    for m, n, k in sizes.small:
        title = f"qlinear, few rows: M={m} N={n} K={k}"
        yield table(title, linear(m, n, k, device, small=True), measured, device)
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
    words = sys.argv[1:] if arguments is None else list(arguments)
    content: dict[str, Any] = {
        "title": TITLE,
        "command": shlex.join(["python", "-m", "benchmarks.gpu_ops", *words]),
        "machine": machine() | facts,
        "tables": [],
    }
    for one in tables(sizes, measured, device):
        content["tables"].append(one)
        print(f"\n{one['title']}")
        for row in one["rows"]:
            print("  " + " | ".join(row), flush=True)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(given.out) as temporary:  # what there is, should the time run out
            temporary.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
