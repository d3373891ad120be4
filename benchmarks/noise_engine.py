# SPDX-License-Identifier: Apache-2.0
"""The noise engine against what one writes without it.

    python -m benchmarks.noise_engine [--elements 100000000] [--rounds 9] [--unet] [--lock FILE]

The floor is an in-place `add_`: one read and one write of every weight. MeZO's way is the loop of
its published trainer (Malladi et al. 2023): reseed, then for each parameter draw z with
`torch.normal` and add it out of place.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import step_memory
from benchmarks.quiet import Hold, held
from benchmarks.step_memory import MemoryRow
from benchmarks.timing import Row, in_turns, keep, machine, text_of
from zo_kernels import rng
from zo_kernels._registry import OPS
from zo_kernels.ops import add_noise_, use_backend
from zo_kernels.optim import ZOSGD
from zo_kernels.testing import assert_same_bits

FLOOR = "in-place add (floor)"


def mezo_perturb(params: Sequence[Tensor], seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    for p in params:
        z = torch.normal(mean=0.0, std=1.0, size=p.size(), device=p.device, dtype=p.dtype)
        p.data = p.data + scale * z


def mezo_step(params: list[Tensor]) -> Callable[[], object]:
    """Its perturb, flip, restore and update; the forward passes are left out on both sides."""

    def step() -> None:
        for scale in (1e-3, -2e-3, 1e-3, -1e-6):
            mezo_perturb(params, 1, scale)

    return step


def backend_of(kind: str, dtype: torch.dtype, device: str) -> str:
    """What `add_noise_` runs on; its bits are compared with the reference's before it is timed."""
    fast, slow = (torch.ones(4097, dtype=dtype, device=device) for _ in range(2))
    add_noise_([fast], [0], 1, [0], [1e-3], kind=kind)
    with use_backend("reference"):
        add_noise_([slow], [0], 1, [0], [1e-3], kind=kind)
    assert_same_bits(fast, slow)
    numbers = (torch.ones(1), torch.tensor(1.0))
    return OPS["add_noise_"].choose(([fast], [0], 1, [0], *numbers, kind))


def one_tensor(elements: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    p = torch.zeros(elements, dtype=dtype, device=device)
    generator = torch.Generator(device)

    def normal_then_add() -> None:
        generator.manual_seed(1)
        z = torch.normal(0.0, 1.0, p.shape, generator=generator, dtype=dtype, device=device)
        p.add_(z, alpha=1e-3)

    def noise(kind: str, **rounding: int) -> Callable[[], object]:
        return lambda: add_noise_([p], [0], 1, [0], [1e-3], kind=kind, **rounding)

    candidates: dict[str, Callable[[], object]] = {
        FLOOR: lambda: p.add_(1e-3),
        "add_noise_ rademacher": noise("rademacher"),
        "add_noise_ normal": noise("normal"),
    }
    if dtype != torch.float32:
        candidates["add_noise_ normal, stochastic rounding"] = noise("normal", round_draw=-1)
    return candidates | {"torch.normal, then add_": normal_then_add}


def zo_step(params: list[Tensor], **options: object) -> Callable[[], object]:
    """A two-sided step of ZOSGD, in place, without its forward passes."""
    for p in params:
        p.requires_grad_()
    losses = iter(float(i % 2) for i in range(10**9))
    optimizer = ZOSGD(params, lr=1e-6, probe="in_place", **options)  # type: ignore[arg-type]
    optimizer.steps = 33  # past the first looks at the grid, which a long run does not notice
    return lambda: optimizer.step(lambda: next(losses))


STEPS: dict[str, Callable[[list[Tensor]], Callable[[], object]]] = {
    "ZOSGD.step, normal": zo_step,
    "ZOSGD.step, normal, keep_perturbed": partial(zo_step, keep_perturbed=True),
    "ZOSGD.step, rademacher, keep_perturbed": partial(
        zo_step, kind="rademacher", keep_perturbed=True
    ),
    "MeZO's step": mezo_step,
}


def steps(params: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The floor and whole steps over many tensors."""

    def floor() -> None:
        with torch.no_grad():
            torch._foreach_add_(params, 1e-3)

    return {FLOOR: floor} | {name: make(params) for name, make in STEPS.items()}


def unet_shapes() -> list[torch.Size]:
    """The 686 parameters of Stable Diffusion 1.5's UNet, 860 M values: diffusers' defaults."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
    return [p.shape for p in unet.parameters()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise_engine", description=__doc__)
    parser.add_argument("--elements", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--unet", action="store_true", help="also 686 tensors of 860 M values")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/noise_engine.json"))
    parser.add_argument("--lock", type=Path, help="file to hold while timing (flock)")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    millions = f"{given.elements / 1e6:.0f} M"
    groups: dict[str, Sequence[Row | MemoryRow]] = {}

    def measure(title: str, candidates: dict[str, Callable[[], object]]) -> None:
        with Hold(given.lock) as hold:
            rows = in_turns(candidates, floor=FLOOR, rounds=given.rounds, between=hold.renew)
        groups[title] = rows
        print(text_of(title, rows), flush=True)

    print(machine())
    for dtype in (torch.float32, torch.bfloat16):
        title = f"{millions} values, {str(dtype).removeprefix('torch.')}"
        for kind in rng.KINDS:
            print(f"{title}: add_noise_ {kind} runs on {backend_of(kind, dtype, device)}")
        measure(title, one_tensor(given.elements, dtype, device))
    tensors = [torch.zeros(given.elements, device=device)]
    measure(f"a step, one tensor of {millions} values, float32", steps(tensors))
    if given.unet:
        shapes = unet_shapes()
        title = "the 686 tensors of SD1.5's UNet, float32"
        tensors = []
        if (why := step_memory.unavailable(device)) is None:
            with held(given.lock, exclusive=False):
                memory = step_memory.measure(STEPS, shapes, device)
            groups[f"memory of a step, {title}"] = memory
            print(step_memory.text_of(f"memory of a step, {title}", memory), flush=True)
        else:
            print(f"memory of a step: not measured, {why}")
        tensors = [torch.zeros(shape, device=device) for shape in shapes]
        measure(f"a step, {title}", steps(tensors))
    keep(given.out, groups)


if __name__ == "__main__":
    main()
