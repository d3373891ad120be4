# SPDX-License-Identifier: Apache-2.0
"""The noise engine on a GPU: many tensors in one launch, CUDA C++ and others' ways beside ours.

    python -m benchmarks.gpu_noise [--out FILE] [--tiny]

Rates count one read and one write of what an op keeps, as shares of a copy's measured rate. Times
are medians with the 20th and the 80th percentile, caches flushed. A row of ours is refused unless
it has the bits of the reference. CUDA C++ has rows where it was built (see `zo_kernels._native`).
MeZO's way: reseed, then for each parameter `torch.normal` and an addition out of place, as in its
published trainer. FZOO's way, as its paper describes it: the same loop with random signs. Without a
GPU it says so and ends; `--tiny` runs tiny sizes through the same code there.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ops import peaks, unavailable
from benchmarks.gpu_table import Candidate, by_cpp, record, table
from benchmarks.noise_engine import mezo_perturb, unet_shapes
from benchmarks.timing import machine
from zo_kernels import _native
from zo_kernels._registry import OPS, use_backend
from zo_kernels.ops import add_noise_, zo_adam_, zo_sgd_
from zo_kernels.optim import ZOSGD, GraphedStep
from zo_kernels.testing import assert_same_bits

OUT = Path("benchmarks/results/gpu_noise.json")
TITLE = "The noise engine on a GPU"
KINDS = ("rademacher", "normal")
Call = Callable[[], object]
Make = Callable[[list[Tensor]], Call]


def fzoo_perturb(params: Sequence[Tensor], seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    for p in params:
        z = torch.randint(0, 2, p.shape, device=p.device, dtype=p.dtype) * 2 - 1
        p.data = p.data + scale * z


def ours(name: str, make: Make, params: list[Tensor], work: float) -> Iterator[Candidate]:
    """A row for each backend of ours: `make` returns the call that updates the tensors given."""
    few = [torch.linspace(-1, 1, n, device=params[0].device).to(params[0].dtype) for n in (1, 4097)]
    wanted = [x.clone() for x in few]
    with use_backend("reference"):
        make(wanted)()
    chosen = OPS["add_noise_"].choose((few, [0, 1], 1, [], torch.ones(0), torch.ones(()), "normal"))
    ways: dict[str, Callable[[Call], Call]] = {chosen: lambda call: call}
    if params[0].is_cuda and _native.load_cuda() is None:
        ways["cuda c++"] = by_cpp
    for backend, way in ways.items():
        got = [x.clone() for x in few]
        way(make(got))()
        for x, y in zip(got, wanted, strict=True):
            assert_same_bits(x, y)
        yield Candidate(name, way(make(params)), work, "copy", backend)


def perturbing(kind: str) -> Make:
    def make(params: list[Tensor]) -> Call:
        streams = list(range(len(params)))
        return lambda: add_noise_(params, streams, 1, [0], [1e-3], kind=kind)

    return make


def descending(params: list[Tensor]) -> Call:
    streams, buffers = list(range(len(params))), [torch.zeros_like(p).float() for p in params]
    return lambda: zo_sgd_(params, buffers, streams, 1, [0], [0.1], lr=1e-6, momentum=0.9)


def adapting(params: list[Tensor]) -> Call:
    streams = list(range(len(params)))
    moments = [[torch.zeros_like(p).float() for p in params] for _ in range(2)]
    return lambda: zo_adam_(params, *moments, streams, 1, [0], [0.1], step=1, lr=1e-6)


def perturbations(params: list[Tensor], loops: bool) -> Iterator[Candidate]:
    work = 2.0 * sum(p.numel() * p.element_size() for p in params)
    for kind in KINDS:
        yield from ours(f"add_noise_ {kind}", perturbing(kind), params, work)
    if loops:
        yield Candidate("MeZO's loop", partial(mezo_perturb, params, 1, 1e-3), work, "copy")
        yield Candidate("FZOO's loop", partial(fzoo_perturb, params, 1, 1e-3), work, "copy")


def updates(params: list[Tensor]) -> Iterator[Candidate]:
    states = 8.0 * sum(p.numel() for p in params)  # bytes of a read and a write of one
    work = 2.0 * sum(p.numel() * p.element_size() for p in params)
    yield from ours("zo_sgd_ with momentum", descending, params, work + states)
    yield from ours("zo_adam_", adapting, params, work + 2 * states)


def steps(params: list[Tensor]) -> Iterator[Candidate]:
    """Whole two-sided steps with a closure of next to nothing: what the host and launches cost."""
    work = 3 * 2.0 * sum(p.numel() * p.element_size() for p in params)
    for p in params:
        p.requires_grad_()

    def loss() -> Tensor:
        return params[0].sum()

    for graphed in (False, True):
        optimizer = ZOSGD(params, lr=1e-6, probe="in_place")
        optimizer.steps = 33  # past the first looks at the grid
        name = "GraphedStep" if graphed else "ZOSGD.step"
        call = GraphedStep(optimizer, loss) if graphed else partial(optimizer.step, loss)
        yield Candidate(name, call, work, "copy", "two CUDA graphs" if graphed else "eager")


def tables(tiny: bool, measured: dict[str, float], device: str) -> Iterator[dict[str, Any]]:
    one, count, small = (1000, 5, 100) if tiny else (2**28, 1000, 2**14)
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        params = [torch.zeros(one, dtype=dtype, device=device)]
        title = f"noise, one tensor of {one} values, {short}"
        yield table(title, perturbations(params, True), measured, device)
        yield table(f"updates, {one} values, {short}", updates(params), measured, device)
        params = [torch.zeros(small, dtype=dtype, device=device) for _ in range(count)]
        title = f"noise, {count} tensors of {small} values, {short}"
        yield table(title, perturbations(params, True), measured, device)
    params = [torch.zeros(small, device=device) for _ in range(count)]
    yield table(f"steps, {count} tensors of {small} values", steps(params), measured, device)
    if not tiny:
        try:
            shapes = unet_shapes()
        except ImportError:
            return
        params = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
        title = f"noise, the {len(shapes)} tensors of SD1.5's UNet, bfloat16"
        yield table(title, perturbations(params, True), measured, device)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.gpu_noise``; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_noise", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, wherever this runs")
    given = parser.parse_args(arguments)
    if not given.tiny and (why := unavailable()) is not None:
        print(f"nothing measured: {why}")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = peaks(64 if given.tiny else 8192, 1000 if given.tiny else 2**28, device)
    facts = {"peak, copy": f"{measured['copy'] / 1e12:.2f} TB/s"}
    facts["CUDA C++"] = _native.load_cuda() or "built"
    print(machine() | facts, flush=True)
    record(
        "gpu_noise",
        TITLE,
        arguments,
        machine() | facts,
        tables(given.tiny, measured, device),
        given.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
