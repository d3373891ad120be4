# SPDX-License-Identifier: Apache-2.0
"""A whole UNet and a whole ZOODiP step on a GPU, at Stable Diffusion 1.5's true size.

    python -m benchmarks.gpu_steps [--out FILE] [--tiny]

Weights are random: time and memory depend on shapes and formats. A forward has batch 3, what a
step sees of three pictures of 512 pixels; a step has two directions, so three forwards' worth of
samples: ours in one forward, replayed as a CUDA graph or not, the paper's way in three. Activations
are bf16 between layers. Times are medians with the 20th and the 80th percentile; the peak is what
torch allocated at most in the second call, with what the model holds: there a graph is captured,
and what its replays use is counted. Errors are against torch bf16. Without a GPU it says so and
ends; `--tiny` runs a tiny UNet through the same code.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import sd15
from benchmarks.gpu_ops import unavailable
from benchmarks.gpu_table import Missing, record, timed
from benchmarks.personal_memory import Family
from benchmarks.timing import machine
from persona.base import quantize
from persona.config import TextualInversionConfig
from persona.data import Example
from persona.fused import fuse_
from persona.methods.textual_inversion import TextualInversion
from zo_kernels.optim import ZOSGD, GraphedStep
from zo_kernels.quant import QuantConfig, quantize_

OUT = Path("benchmarks/results/gpu_steps.json")
TITLE = "A UNet and a step on a GPU"
BATCH, DIRECTIONS = 3, 2
SPECS = ("w8a8", "w4a8-g64")
IN_TURNS = ("optimum-quanto int8", "torch bf16 compiled")  # have steps of forwards in turns
WAYS = {"CUDA graph": True, "eager": False}
SKIP = ("conv_in", "conv_out")  # 4 channels in, 4 out: nothing to gain
Forward = Callable[[], Tensor]


def torch_bf16(size: str, device: str) -> Forward:
    return _forward(sd15.unet(size, torch.bfloat16).to(device), size, device)


def torch_compiled(size: str, device: str) -> Forward:
    torch.compiler.reset()
    model = sd15.unet(size, torch.bfloat16).to(device)
    backend = "inductor" if device == "cuda" else "eager"
    compiled: Any = torch.compile(model, backend=backend, dynamic=False)
    return _forward(compiled, size, device)


def quanto_int8(size: str, device: str) -> Forward:
    """How the paper holds its UNet."""
    from optimum import quanto

    model = sd15.unet(size, torch.bfloat16).to(device)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return _forward(model, size, device)


def ours(size: str, device: str, spec: str) -> Forward:
    model = sd15.unet(size, torch.bfloat16)
    quantize_(model, QuantConfig(spec=spec, skip=SKIP))
    fuse_(model)
    return _forward(model.to(device), size, device)


def _forward(model: Any, size: str, device: str) -> Forward:
    latents, timesteps, text = (x.to(device) for x in sd15.inputs(size, BATCH))
    latents = latents.bfloat16().to(memory_format=torch.channels_last)
    text = text.bfloat16()

    @torch.no_grad()
    def forward() -> Tensor:
        y: Tensor = model(latents, timesteps, text, return_dict=False)[0]
        return y.float()

    return forward


def zoodip(size: str, device: str, precision: str, graph: bool) -> Callable[[], object]:
    """A step of three pictures and two directions, in one forward where it fits."""
    config = TextualInversionConfig(
        initializer_token="light",
        base_precision=precision,
        activation_precision="int8",
        train_batch_size=BATCH,
        zo_n=DIRECTIONS,
        evaluations_per_forward=DIRECTIONS + 1,
        cuda_graph=graph,
    )
    family = Family(size)
    quantize(config, family)
    family.pipe.unet.to(device, torch.bfloat16)
    family.pipe.text_encoder.to(device)
    pixels = 8 * family.size
    pictures = [
        Example(Path(f"{i}.png"), Image.new("RGB", (pixels, pixels)), ("a photo of {}",))
        for i in range(BATCH)
    ]
    return TextualInversion(family, config, pictures).step


def all_weights(size: str, device: str, graph: bool) -> Callable[[], object]:
    """A two-sided step of ZOSGD on a bf16 model, whose perturbed weights are never written."""
    model = sd15.unet(size, torch.bfloat16).to(device).requires_grad_(True)
    forward = _forward(model, size, device)
    optimizer = ZOSGD(model.parameters(), lr=1e-6, probe="virtual")

    def loss() -> Tensor:
        return forward().square().mean()

    return GraphedStep(optimizer, loss) if graph else partial(optimizer.step, loss)


STACKS: dict[str, Callable[[str, str], Forward]] = {
    "torch bf16": torch_bf16,
    "torch bf16 compiled": torch_compiled,
    "optimum-quanto int8": quanto_int8,
}
STACKS |= {
    f"zo_kernels {spec}": lambda size, device, spec=spec: ours(size, device, spec)  # type: ignore[misc]
    for spec in SPECS
}


def _peak(call: Callable[[], object], device: str) -> str:
    """GB allocated at most; torch counts on CUDA alone."""
    if device != "cuda":
        return "-"
    torch.cuda.reset_peak_memory_stats()
    call()
    return f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _made(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, or `Missing`."""
    try:
        call = make()
        call()
    except ImportError as why:
        return Missing(name, f"not installed ({why.name})")
    except torch.OutOfMemoryError as why:
        return Missing(name, f"does not fit: {str(why).splitlines()[0]}")
    return call


def unets(size: str, device: str) -> dict[str, Any]:
    """One forward of each stack."""
    rows, expected = [], None
    for name, make in STACKS.items():
        call = _made(name, lambda make=make: make(size, device))
        if isinstance(call, Missing):
            rows.append([name, call.why, "", "", ""])
            continue
        y = call()
        expected = y if expected is None else expected
        error = float((y - expected).norm() / expected.norm())
        peak = _peak(call, device)
        median, low, high = timed(call, device)
        rows.append([name, f"{median:.2f}", f"{low:.2f} to {high:.2f}", peak, f"{error:.1e}"])
        del call
        _free()
    title = f"{sd15.ARCHITECTURES[size].title}, one forward of batch {BATCH}"
    return {
        "title": title,
        "columns": ["", "median ms", "20 to 80 %", "peak GB", "rel. error"],
        "rows": rows,
    }


def steps(size: str, device: str) -> dict[str, Any]:
    """Steps a second: ours, and three forwards one after another of the others."""

    def in_turns(make: Callable[[str, str], Forward]) -> Callable[[], object]:
        forward = make(size, device)
        return lambda: [forward() for _ in range(1 + DIRECTIONS)]

    makers: dict[str, Callable[[], Callable[[], object]]] = {
        f"ZOODiP, zo_kernels {precision}, {how}": partial(zoodip, size, device, precision, graph)
        for precision in ("int8", "int4")
        for how, graph in WAYS.items()
    }
    makers |= {
        f"ZOSGD on all weights, two forwards, {how}": partial(all_weights, size, device, graph)
        for how, graph in WAYS.items()
    }
    for name in [name for name in STACKS if name in IN_TURNS]:
        title = f"three forwards alone, {name}"
        makers[title] = lambda make=STACKS[name]: in_turns(make)  # type: ignore[misc]
    rows = []
    for name, make in makers.items():
        call = _made(name, make)
        if isinstance(call, Missing):
            rows.append([name, call.why, "", ""])
            continue
        peak = _peak(call, device)
        median, low, high = timed(call, device)
        spread = f"{1e3 / high:.2f} to {1e3 / low:.2f}"
        rows.append([name, f"{1e3 / median:.2f}", spread, peak])
        del call
        _free()
    what = f"{DIRECTIONS} directions, batch {BATCH}, {8 * sd15.ARCHITECTURES[size].size} pixels"
    return {
        "title": f"Steps a second: {what}",
        "columns": ["", "steps / s", "20 to 80 %", "peak GB"],
        "rows": rows,
    }


def tables(size: str, device: str) -> Iterator[dict[str, Any]]:
    yield unets(size, device)
    yield steps(size, device)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.gpu_steps``; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_steps", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tiny", action="store_true", help="a tiny UNet, wherever this runs")
    given = parser.parse_args(arguments)
    if not given.tiny and (why := unavailable()) is not None:
        print(f"nothing measured: {why}")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record(
        "gpu_steps",
        TITLE,
        arguments,
        machine(),
        tables("tiny" if given.tiny else "sd15", device),
        given.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
