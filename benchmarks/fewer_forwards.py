# SPDX-License-Identifier: Apache-2.0
"""How many pictures through the UNet an estimator needs: curves of textual inversion on subjects.

    python -m benchmarks.fewer_forwards --subjects FILE.npz [--estimators a,b] [--seeds 0,1,2]

A run is stopped at points of its budget and measured there, on figures that have no noise of their
own: the denoising loss over fixed noise at fixed timesteps, for the two styles that are trained and
for the third, and at the later points the cosine of drawn pictures to the true one. A row a run is
appended as it finishes; rows that are there are not made again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.curve_tables import write_tables
from benchmarks.personal_methods import pictures_a_step
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
from persona.config import TextualInversionConfig
from persona.data import load_folder, to_pixels
from persona.evaluate import Scorer
from persona.families import StableDiffusion, load_pipeline
from persona.files import append_text, make_folder
from persona.methods.textual_inversion import TextualInversion

ROWS = Path("benchmarks/results/fewer_forwards.jsonl")
POINTS = (48, 96, 192, 384, 768, 1536)  # pictures through the UNet
DRAWN = (192, 384, 768, 1536)  # at these, pictures are drawn too
TIMES = 8  # fixed timesteps
TOKEN = "<subject>"

# One direction and one picture a step, floating activations as in the paper; and many of both, so
# that int8 activations suffice.
_SMALL: dict[str, Any] = {"zo_n": 1, "zo_estimator": "two_sided", "zo_subspace": "off"}
_WORDS = _SMALL | {"zo_space": "vocabulary", "learning_rate": 1e-2}
_LARGE: dict[str, Any] = {
    "train_batch_size": 4,
    "zo_n": 4,
    "zo_estimator": "two_sided",
    "zo_subspace": "off",
    "zo_eps": 2e-2,
    "learning_rate": 6e-3,
    "adam_epsilon": 1e-8,
    "activation_precision": "int8",
    "min_timestep": 400,
    "max_timestep": 1000,
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "paper": TextualInversionConfig.presets["paper"],
    "released-code": TextualInversionConfig.presets["released-code"],
    "default": {},
    "default, no subspace": {"zo_subspace": "off"},
    "default, random subspace": {"zo_subspace": "random"},
    "one direction, two-sided": _SMALL,
    "the same, shaped by the vocabulary": _WORDS,
    "rank 64 of it": _WORDS | {"zo_rank": 64},
    "64 random dimensions": _WORDS | {"zo_space": "random", "zo_rank": 64},
    "shaped, averaged": _WORDS | {"average": 0.98},
    "shaped, cosine": _WORDS | {"learning_rate": 2e-2, "learning_rate_schedule": "cosine"},
    "shaped, 32 fixed draws": _WORDS | {"fixed_draws": 32},
    "four directions, four pictures": _LARGE,
}


class Curve:
    """One run: trains, and measures at points.

    Args:
        config: options of the run; the model and the pictures among them.
        subject: whose held-out style is measured.
        held_out: scores pictures of that style; None: none are drawn.
    """

    def __init__(
        self, config: TextualInversionConfig, subject: Subject, judge: Judge | None
    ) -> None:
        self.config, self.subject, self.judge = config, subject, judge
        self.family = load_base(config)
        examples = load_folder(Path(config.train_data_dir), resolution=self.family.resolution)
        self.method = TextualInversion(self.family, config, examples)
        styles = list(subject.pictures)
        self.ids = self.family.tokenize([f"a {style} of a {TOKEN}" for style in styles])
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

    def run(self, points: Sequence[int], drawn: Sequence[int]) -> list[dict[str, float]]:
        figures = [self.figures(draw=False)]
        for point in points:
            per_step = self.method.estimator.evaluations * self.config.train_batch_size
            while self.pictures + per_step <= point:
                self.method.step()
            figures.append(self.figures(draw=point in drawn))
        return figures

    @torch.inference_mode()
    def figures(self, draw: bool) -> dict[str, float]:
        hidden = self.family.encode_tokens(self.ids).repeat_interleave(TIMES, 0)
        error = (self.family.predict(self.x_t, self.t, hidden) - self.target).square()
        losses = error.flatten(1).mean(1).view(-1, TIMES).mean(1)  # [styles]
        row = {
            "pictures": self.pictures,
            "trained_loss": losses[:-1].mean().item(),
            "held_out_loss": losses[-1].item(),
        }
        if draw and self.judge is not None:
            row["fidelity"] = self._fidelity(self.judge)
        return row

    def _fidelity(self, judge: Judge) -> float:
        drawing, style = Drawing(), self.subject.held_out
        images = self.family.sample(
            [f"a {style} of a {TOKEN}"] * drawing.held_out,
            seed=1000 * self.config.seed,
            steps=drawing.steps,
            guidance=drawing.guidance,
        )
        return judge.likeness(images, self.subject, style)["cosine"]


def steps_of(options: dict[str, Any]) -> int:
    """Steps that the last point allows: where a schedule ends."""
    return POINTS[-1] // pictures_a_step({"command": "ti", **options})


def fill(given: argparse.Namespace) -> None:
    """Every run that is missing; subject by subject, so that all estimators get as far."""
    tokenizer = StableDiffusion(load_pipeline(given.model)).pipe.tokenizer
    subjects = read_subjects(given.subjects, one_token(tokenizer))
    check_count(given.subjects_count, subjects)
    judge = Judge(Scorer.default(), subjects)
    known = {row["key"] for row in read_rows(given.out)}
    for subject in subjects[: given.subjects_count]:
        for seed in given.seeds:
            for name in given.estimators:
                options = ESTIMATORS[name] | {"max_train_steps": steps_of(ESTIMATORS[name])}
                case = {"options": options, "points": POINTS, "drawn": DRAWN, "seed": seed}
                key = row_key(case | {"digest": subject.digest, "model": Path(given.model).name})
                if key not in known:
                    row = {"key": key, "estimator": name, "subject": subject.name, "seed": seed}
                    with tempfile.TemporaryDirectory() as folder:
                        config = TextualInversionConfig(
                            pretrained_model_name_or_path=given.model,
                            train_data_dir=str(subject.write(Path(folder))),
                            placeholder_token=TOKEN,
                            initializer_token=subject.word,
                            seed=seed,
                            **options,
                        )
                        row["curve"] = Curve(config, subject, judge).run(POINTS, DRAWN)
                    append_text(given.out, json.dumps(row) + "\n")
                    known.add(key)
                    last = {k: round(v, 4) for k, v in row["curve"][-1].items()}
                    print(f"{subject.name}, seed {seed}, {name}: {last}", flush=True)
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
