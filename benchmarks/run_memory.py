# SPDX-License-Identifier: Apache-2.0
"""What a whole run of ``persona ti`` holds at Stable Diffusion 1.5's true size, part by part.

    python -m benchmarks.run_memory [--model FOLDER] [--cases a,b]

From a folder as such a model is published (fp16) to the learned token: loading, two pictures of 512
pixels encoded, one drawn before and after, training, decoding. Weights are random where no model is
given. Counted is the resident set at its peak in each part, less what the process held when
everything was imported; each run is a process of its own, and so is ``persona plan``, which bounds
the highest point without a weight.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import sd15, sd15_pipeline
from benchmarks.memory_rows import Row, fill, in_own_process
from benchmarks.personalization import exit_code, known_names
from persona.config import TextualInversionConfig
from persona.memory import resident_bytes
from persona.methods.textual_inversion import TextualInversion
from persona.plan import plan
from persona.train import textual_inversion

OUT = Path("benchmarks/results/run_memory.json")
FACTS = {
    "title": "Memory of a whole run",
    "command": "python -m benchmarks.run_memory",
    "note": " ".join(__doc__.split("\n\n")[2].split()),
}
PICTURES = 2
PARTS = ("loading", "pictures before", "training", "pictures after", "decoding")


@dataclass(frozen=True)
class Case:
    """A row: how the table calls it, and the options of the run."""

    title: str
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "int8": Case("int8"),
    "int4": Case("int4", {"base_precision": "int4"}),
    "int8-together": Case(
        "int8, a step's nine evaluations together", {"evaluations_per_forward": 9}
    ),
    "as-loaded": Case("fp32", {"base_precision": "as-loaded"}),
}


def config_of(case: Case, model: Path, folder: Path) -> TextualInversionConfig:
    return TextualInversionConfig.from_preset(
        "gauss-newton",
        pretrained_model_name_or_path=str(model),
        train_data_dir=str(folder),
        output_dir=str(folder / "out"),
        initializer_token="light",
        device="cpu",
        max_train_steps=1,
        num_validation_images=1,
        num_inference_steps=2,
        **case.options,
    )


def measure(case: Case, model: Path, folder: Path) -> dict[str, int]:
    """In a process of its own: bytes after importing, and at the peak of each part of the run."""
    imported = resident_bytes()
    result = textual_inversion(config_of(case, model, folder), progress=False)
    return {"imported": imported, **result.peaks}


def measure_plan(case: Case, model: Path, folder: Path) -> dict[str, int]:
    """In a process of its own: bytes over import that a plan tells as the highest of the run."""
    imported = resident_bytes()
    return {"planned": plan(TextualInversion, config_of(case, model, folder)).highest - imported}


def row(name: str, model: Path) -> Row:
    """`measure` in a fresh process, on pictures of noise as large as the model draws."""
    with tempfile.TemporaryDirectory() as folder:
        generator = torch.Generator().manual_seed(0)
        for i in range(PICTURES):
            noise = torch.randint(256, (512, 512, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(noise.numpy()).save(Path(folder) / f"{i}.png")
        arguments = ("--model", str(model), "--work", folder)
        measured = in_own_process("run_memory", name, *arguments)
        return measured | in_own_process("run_memory", name, *arguments, "--plan")


def table(rows: dict[str, Row]) -> dict[str, Any]:
    lines = []
    for name in (n for n in CASES if n in rows):
        over = [(rows[name][part] - rows[name]["imported"]) / 1e9 for part in PARTS]
        told = rows[name]["planned"] / 1e9
        lines.append([CASES[name].title, *(f"{x:.2f}" for x in (*over, max(over), told))])
    return {
        "title": "GB over import at the peak of each part, Stable Diffusion 1.5's size",
        "columns": ["Gauss-Newton on a token", *PARTS, "whole run", "as planned"],
        "rows": lines,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.run_memory``; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_memory")
    parser.add_argument("--model", type=Path, help="diffusers folder; default: random")
    parser.add_argument("--size", default="sd15", choices=sorted(sd15.ARCHITECTURES))
    parser.add_argument("--cases", default=",".join(CASES), help="default: all")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        look = measure_plan if given.plan else measure
        print(json.dumps(look(CASES[given.worker], given.model, given.work)))
        return 0

    def run() -> None:
        names = known_names("cases", given.cases, CASES)
        with ExitStack() as stack:
            model = given.model
            if model is None:
                model = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                sd15_pipeline.save(given.size, model)
            fill(given.out, names, partial(row, model=model), table, FACTS)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
