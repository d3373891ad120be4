# SPDX-License-Identifier: Apache-2.0
"""How many pictures through the UNet an estimator needs: curves of textual inversion on subjects.

    python -m benchmarks.fewer_forwards --subjects FILE.npz [--estimators a,b] [--seeds 0,1,2]

A run is stopped at points of its budget and measured there, on figures that have no noise of their
own: the denoising loss over fixed noise at fixed timesteps, for the two styles that are trained and
for the third. After a quarter and all of it, and for some estimators a fifth, pictures are drawn
too, for their cosine to the true one. Runs of one recipe share their forward passes
(`benchmarks.lockstep`). A row a run is appended as they finish; rows that are there are not made
again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import lockstep
from benchmarks.curve_tables import write_tables
from benchmarks.personal_methods import SMALL, WORDS, pictures_a_step
from benchmarks.personal_scores import Drawing, Judge
from benchmarks.personal_subjects import Subject, read_subjects
from benchmarks.personal_tables import read_rows
from benchmarks.personalization import (
    check_count,
    exit_code,
    integers,
    known_names,
    one_token,
    row_key,
)
from persona.base import load_base
from persona.batches import mean_errors
from persona.config import TextualInversionConfig
from persona.data import load_folder, to_pixels
from persona.evaluate import Scorer
from persona.families import StableDiffusion, load_pipeline
from persona.files import append_text, make_folder
from persona.methods.textual_inversion import TextualInversion

ROWS = Path("benchmarks/results/fewer_forwards.jsonl")
POINTS = (12, 24, 48, 96, 192, 384, 768)  # pictures through the UNet
DRAWN = (192, 768)  # at these, pictures are drawn too
FIFTH = 153  # of the last point
TIMES = 8  # fixed timesteps
TOGETHER = 4  # subjects

_PAPER: dict[str, Any] = TextualInversionConfig.presets["paper"]
_NEWTON: dict[str, Any] = TextualInversionConfig.presets["gauss-newton"]
# For many directions: then int8 activations suffice.
_INT8: dict[str, Any] = {
    "zo_eps": 2e-2,
    "activation_precision": "int8",
    "min_timestep": 400,
    "max_timestep": 1000,
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "paper, no subspace": _PAPER | {"zo_subspace": "off"},
    "paper, random subspace": _PAPER | {"zo_subspace": "random"},
    "paper, t uniform": _PAPER | {"min_timestep": 0, "max_timestep": 1000},
    "released code": TextualInversionConfig.presets["released-code"],
    "one direction, two-sided": SMALL,
    "shaped by the vocabulary": WORDS,
    "64 dimensions of it": WORDS | {"zo_rank": 64},
    "64 random dimensions": WORDS | {"zo_space": "random", "zo_rank": 64},
    "shaped, averaged": WORDS | {"average": 0.98},
    "shaped, cosine": WORDS | {"learning_rate": 2e-2, "learning_rate_schedule": "cosine"},
    "shaped, 32 fixed draws": WORDS | {"fixed_draws": 32},
    "shaped, int8, eight directions": WORDS | _INT8 | {"zo_n": 8},
    "int8, fifteen directions, four pictures": _PAPER
    | _INT8
    | {"zo_n": 15, "train_batch_size": 4, "learning_rate": 6e-3},
    "32 dimensions of the encoder": _PAPER | {"zo_space": "encoder", "zo_rank": 32},
    "gauss-newton": _NEWTON,
    "gauss-newton, 32 of the encoder": _NEWTON | {"zo_space": "encoder"},
    "gauss-newton, 32 random dimensions": _NEWTON | {"zo_space": "random"},
}
# As good after a quarter as the paper's after all: drawn at a fifth too.
EARLY = (
    "shaped, 32 fixed draws",
    "gauss-newton",
    "gauss-newton, 32 of the encoder",
    "gauss-newton, 32 random dimensions",
)


@dataclass(frozen=True)
class Job:
    """One run: its row in the file, and the recipe."""

    key: str
    estimator: str
    subject: Subject
    seed: int
    options: dict[str, Any]
    drawn: tuple[int, ...]

    @property
    def points(self) -> list[int]:
        return sorted({*POINTS, *self.drawn})


class Curve:
    """One run, measured at points.

    Args:
        family: the model, of which several runs may make use.
        config: options of the run; the pictures and a token of its own among them.
        subject: whose held-out style is measured.
        judge: scores pictures of that style.
    """

    def __init__(
        self,
        family: StableDiffusion,
        config: TextualInversionConfig,
        subject: Subject,
        judge: Judge,
    ) -> None:
        self.family, self.config, self.subject, self.judge = family, config, subject, judge
        examples = load_folder(Path(config.train_data_dir), resolution=self.family.resolution)
        self.method = TextualInversion(self.family, config, examples)
        styles, token = list(subject.pictures), config.placeholder_token
        self.ids = self.family.tokenize([f"a {style} of a {token}" for style in styles])
        x0, _ = self.family.encode_images(to_pixels(list(subject.pictures.values())))
        generator = torch.Generator().manual_seed(123)
        noise = torch.randn(TIMES, *x0.shape[1:], generator=generator)
        t = torch.linspace(60, 960, TIMES).long().repeat(len(styles))
        x0, noise = x0.repeat_interleave(TIMES, 0), noise.repeat(len(styles), 1, 1, 1)
        self.x_t, self.t = self.family.noised(x0, noise, t), t
        self.target = self.family.target(x0, noise, t)

    @property
    def pictures(self) -> int:
        """Through the UNet so far, forwards only."""
        return self.method.forwards * self.config.train_batch_size

    @torch.inference_mode()
    def figures(self, draw: bool) -> dict[str, float]:
        hidden = self.family.encode_tokens(self.ids).repeat_interleave(TIMES, 0)
        errors = mean_errors(self.family.predict(self.x_t, self.t, hidden), self.target)
        losses = errors.view(-1, TIMES).mean(1)  # [styles]
        row = {
            "pictures": self.pictures,
            "trained_loss": losses[:-1].mean().item(),
            "held_out_loss": losses[-1].item(),
        }
        if draw:
            row["fidelity"] = self._fidelity()
        return row

    def _fidelity(self) -> float:
        drawing, style = Drawing(), self.subject.held_out
        images = self.family.sample(
            [f"a {style} of a {self.config.placeholder_token}"] * drawing.held_out,
            seed=1000 * self.config.seed,
            steps=drawing.steps,
            guidance=drawing.guidance,
        )
        return self.judge.likeness(images, self.subject, style)["cosine"]


def steps_of(options: dict[str, Any]) -> int:
    """Steps that the last point allows: where a schedule ends."""
    return POINTS[-1] // pictures_a_step({"command": "ti", **options})


def run(jobs: Sequence[Job], model: str, judge: Judge) -> list[list[dict[str, float]]]:
    """The curves of runs that share their forward passes: jobs of one estimator."""
    options = jobs[0].options
    with tempfile.TemporaryDirectory() as folder:
        configs = [
            TextualInversionConfig(
                pretrained_model_name_or_path=model,
                train_data_dir=str(job.subject.write(Path(folder) / str(i))),
                placeholder_token=f"<subject-{i}>",
                initializer_token=job.subject.word,
                device="cpu",
                seed=job.seed,
                **options,
            )
            for i, job in enumerate(jobs)
        ]
        family = load_base(configs[0])
        curves = [
            Curve(family, config, job.subject, judge)
            for config, job in zip(configs, jobs, strict=True)
        ]
    per_step = pictures_a_step({"command": "ti", **options})
    figures = [[curve.figures(draw=False)] for curve in curves]
    for point in jobs[0].points:
        while curves[0].pictures + per_step <= point:
            lockstep.step([curve.method for curve in curves])
        for found, curve in zip(figures, curves, strict=True):
            found.append(curve.figures(draw=point in jobs[0].drawn))
    return figures


def jobs_of(given: argparse.Namespace, subjects: Sequence[Subject], name: str) -> list[Job]:
    """The runs of an estimator on these subjects."""
    options = ESTIMATORS[name] | {"max_train_steps": steps_of(ESTIMATORS[name])}
    drawn = (FIFTH, *DRAWN) if name in EARLY else DRAWN
    case = {"options": options, "points": POINTS, "drawn": drawn, "model": Path(given.model).name}
    return [
        Job(row_key(case | {"digest": s.digest, "seed": seed}), name, s, seed, options, drawn)
        for s in subjects
        for seed in given.seeds
    ]


def fill(given: argparse.Namespace) -> None:
    """Every run that is missing; a few subjects at a time, so that all estimators get as far."""
    tokenizer = StableDiffusion(load_pipeline(given.model)).pipe.tokenizer
    subjects = read_subjects(given.subjects, one_token(tokenizer))
    check_count(given.subjects_count, subjects)
    judge = Judge(Scorer.default(), subjects)
    known = {row["key"] for row in read_rows(given.out)}
    for some in lockstep.groups(subjects[: given.subjects_count], TOGETHER):
        for name in given.estimators:
            jobs = [job for job in jobs_of(given, some, name) if job.key not in known]
            pictures = pictures_a_step({"command": "ti", **ESTIMATORS[name]})
            for group in lockstep.groups(jobs, max(1, lockstep.PICTURES // pictures)):
                for job, curve in zip(group, run(group, given.model, judge), strict=True):
                    row = {"key": job.key, "estimator": name, "subject": job.subject.name}
                    row |= {"seed": job.seed, "curve": curve}
                    append_text(given.out, json.dumps(row) + "\n")
                    last = {k: round(v, 4) for k, v in curve[-1].items()}
                    print(f"{job.subject.name}, seed {job.seed}, {name}: {last}", flush=True)
        write_tables(given.out, list(ESTIMATORS), __doc__.split("\n\n")[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.fewer_forwards``; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fewer_forwards")
    parser.add_argument("--subjects", type=Path, required=True, help=".npz with a .jsonl beside it")
    parser.add_argument("--model", default="persona/assets/tiny-sd", help="diffusers folder")
    parser.add_argument("--estimators", default=";".join(ESTIMATORS), help="with ; between")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--subjects_count", type=int, help="the first so many; default: all")
    parser.add_argument("--out", type=Path, default=ROWS, help="file of rows, .jsonl")
    given = parser.parse_args(arguments)

    def run() -> None:
        given.estimators = known_names("estimators", given.estimators, ESTIMATORS, ";")
        given.seeds = integers(given.seeds)
        make_folder(given.out.parent, "out")
        fill(given)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
