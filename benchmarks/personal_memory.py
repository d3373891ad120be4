# SPDX-License-Identifier: Apache-2.0
"""What a step of a personalization method holds at Stable Diffusion 1.5's true size.

    python -m benchmarks.personal_memory [--methods a,b]

UNet and text encoder have their published shapes and random weights, latents are 64 x 64 (pictures
of 512), and a process of its own makes its peak that method's alone. Counted is the resident set at
its peak over the steps, less what the process held when everything was imported. The VAE, which a
run needs before training and after it, has left, as in a run; `benchmarks.run_memory` is of a whole
run.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import sd15, sd15_pipeline
from benchmarks.memory_rows import Row, fill, in_own_process
from benchmarks.unet_worker import peak_bytes, reset_peak
from persona.base import quantize
from persona.cli import COMMANDS, load_method
from persona.config import RunConfig
from persona.data import Example
from persona.families import StableDiffusion
from persona.memory import give_back_large_blocks, resident_bytes

OUT = Path("benchmarks/results/personalization_memory.json")


@dataclass(frozen=True)
class Case:
    """A row: how the table calls it, and the method with its options; None: inference alone."""

    title: str
    config: RunConfig
    method: str | None = None  # module:class
    published: str = "-"  # GB in ZOODiP's table 1, which counts a CUDA context too
    steps: int = 1  # 2 where the first makes buffers that the second holds beside its activations


def _case(title: str, command: str, published: str = "-", steps: int = 2, **options: Any) -> Case:
    """A method of ``persona``, which probes one by one, along one direction where it is not
    ZOODiP: what a step holds does not depend on how many it has."""
    config, method, _ = COMMANDS[command]
    names = {item.name for item in dataclasses.fields(config)}
    one = {"evaluations_per_forward": 1} if "evaluations_per_forward" in names else {}
    if command != "ti" and "zo_n" in names:
        one["zo_n"] = 1
    options = {"initializer_token": "light", **one, **options}
    return Case(title, config(**options), method, published, steps)


CASES = {
    "inference-int8": Case("one forward, int8", RunConfig()),
    "inference-int4": Case("one forward, int4", RunConfig(base_precision="int4")),
    "zoodip-int8": _case("ZOODiP, int8", "ti", "2.37", steps=1),
    "gauss-newton-int8": _case(
        "Gauss-Newton on a token, int8",
        "ti",
        steps=1,
        **COMMANDS["ti"].config.presets["gauss-newton"],
    ),
    "zoodip-int4": _case("ZOODiP, int4", "ti", "1.9", steps=1, base_precision="int4"),
    "ti-backprop": _case("textual inversion by backpropagation, int8", "ti", optimizer="bp"),
    "peqa-zo": _case("PEQA, zeroth order", "scales", optimizer="zo"),
    "tuneqdm-zo": _case("TuneQDM, zeroth order", "scales", method="tuneqdm", optimizer="zo"),
    "peqa-bp": _case("PEQA", "scales", "6.31"),
    "tuneqdm-bp": _case("TuneQDM", "scales", "8.96", method="tuneqdm"),
    "selective-zo-high": _case("ZO-high on LoRA, int8", "selective", strategy="zo-high"),
    "selective-bp-low": _case("BP-low on LoRA, int8", "selective", strategy="bp-low"),
    "selective": _case(  # two steps of each kind
        "selective on LoRA, int8",
        "selective",
        steps=4,
        strategy="two-phase",
        bp_share=0.5,
        max_train_steps=4,
    ),
    "qlora": _case("QLoRA, r = 2, int8", "dreambooth", "7.56"),
}


class Family(StableDiffusion):
    """UNet and text encoder of a size, with random weights, and latents without a VAE."""

    def __init__(self, name: str) -> None:
        self.size = sd15.ARCHITECTURES[name].size
        pipe = sd15_pipeline.pipeline(name)
        pipe.vae = None
        super().__init__(pipe)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(pixels), 4, *(side // 8 for side in pixels.shape[2:]))
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator), torch.full(shape, 0.1)


def measure(name: str, size: str) -> dict[str, int]:
    """In a process of its own: bytes after importing, after loading, at the peak of the steps."""
    case = CASES[name]
    give_back_large_blocks()  # as `persona.train.train` does
    imported = resident_bytes()
    family = Family(size)
    quantize(case.config, family)
    pixels = 8 * family.size
    examples = [Example(Path("a.png"), Image.new("RGB", (pixels, pixels)), ("a photo of {}",))]
    method = load_method(case.method)(family, case.config, examples) if case.method else None
    reset_peak()
    loaded = resident_bytes()
    peak = 0
    for _ in range(case.steps):
        if method is None:
            _forward(family)
        else:
            method.step()
        peak = max(peak, peak_bytes())  # a selective step begins its own
    return {"imported": imported, "loaded": loaded, "peak": peak}


@torch.inference_mode()
def _forward(family: StableDiffusion) -> None:
    hidden = family.encode_tokens(family.tokenize(["a photo of light"]))
    x, _ = family.encode_images(torch.zeros(1, 3, 8 * family.size, 8 * family.size))
    family.predict(x, torch.tensor([500]), hidden)


def table(rows: dict[str, Row]) -> dict[str, Any]:
    lines = []
    for name in (n for n in CASES if n in rows):
        at = rows[name]
        over = [f"{(at[key] - at['imported']) / 1e9:.2f}" for key in ("loaded", "peak")]
        lines.append([CASES[name].title, *over, CASES[name].published])
    return {
        "title": "GB over import at Stable Diffusion 1.5's size",
        "columns": ["method", "model and state", "peak of a step", "published (GPU, in all)"],
        "rows": lines,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.personal_memory``; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.personal_memory")
    parser.add_argument("--methods", default=",".join(CASES), help="default: all")
    parser.add_argument("--size", default="sd15", choices=sorted(sd15.ARCHITECTURES))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        print(json.dumps(measure(given.worker, given.size)))
        return 0
    names = given.methods.split(",")
    if unknown := sorted(set(names) - set(CASES)):
        print(
            f"error: methods: must be among {', '.join(CASES)}, got {', '.join(unknown)}; separate "
            "them by commas",
            file=sys.stderr,
        )
        return 2
    facts = {
        "title": "Memory of personalization",
        "command": "python -m benchmarks.personal_memory",
        "note": " ".join(__doc__.split("\n\n")[2].split()),
    }

    def row(name: str) -> Row:
        return in_own_process("personal_memory", name, "--size", given.size)

    fill(given.out, names, row, table, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
