# SPDX-License-Identifier: Apache-2.0
"""Personalization, method by method: train on two styles of a subject, generate the third.

    python -m benchmarks.personalization --subjects FILE.npz [--methods a,b] [--seeds 0,1,2]

A row a method, subject and seed is appended to a file as it finishes; a row that is there already
is not made again, so that an interrupted run goes on where it was. After each subject the tables of
`benchmarks.report` are written beside the rows.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import personal_tables
from benchmarks.personal_methods import METHODS, Job, Method, facts
from benchmarks.personal_scores import Drawing, Judge, Sheet, draw, draw_prior
from benchmarks.personal_subjects import Subject, read_subjects
from persona.data import to_pixels
from persona.errors import UserError
from persona.evaluate import Scorer
from persona.families import StableDiffusion, load_pipeline
from persona.files import append_text, make_folder, write_image
from persona.report import grid

VERSION = 1  # of what a row means; rows of another are made again
ROWS = Path("benchmarks/results/personalization.jsonl")
WORK = Path("out/personalization")
CONTROLS = {"true": "true pictures, through the VAE", "copy": "trained pictures, shown as they are"}


def row_key(case: dict[str, Any]) -> str:
    """What a row is known by: a digest of everything that it depends on."""
    text = json.dumps(case | {"version": VERSION}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(
    method: Method, options: dict[str, Any], job: Job, judge: Judge, drawing: Drawing
) -> tuple[dict[str, Any], Sheet]:
    """Train one method on one subject: its figures, and its pictures."""
    shutil.rmtree(job.folder, ignore_errors=True)
    wall, cpu = time.monotonic(), time.process_time()
    learned = method.train(options, job)
    seconds, cpu = time.monotonic() - wall, time.process_time() - cpu
    sheet = draw(learned.family, job.subject, learned.word, job.seed, drawing)
    figures: dict[str, Any] = judge.scores(sheet, job.subject)
    figures |= {"drift": 0.0, "drift_pixels": 0.0}
    if learned.base is not None:
        after = draw_prior(learned.family, job.subject, job.seed, drawing)
        before = draw_prior(learned.base(), job.subject, job.seed, drawing)
        figures |= judge.drift(before, after)
    return figures | {
        "forwards": learned.forwards,
        "backwards": learned.backwards,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "bytes": learned.result_bytes,
    }, sheet


def control(name: str, subject: Subject, family: StableDiffusion, judge: Judge) -> dict[str, Any]:
    """Figures of pictures that nobody generated."""
    trained = {style: [subject.pictures[style]] for style in subject.trained}
    if name == "copy":
        return judge.control([image for (image,) in trained.values()], trained, subject)
    latents, _ = family.encode_images(to_pixels(list(subject.pictures.values())))
    decoded = dict(zip(subject.pictures, decode(family, latents), strict=True))
    return judge.control(
        [decoded[subject.held_out]], {s: [decoded[s]] for s in subject.trained}, subject
    )


def decode(family: StableDiffusion, latents: torch.Tensor) -> list[Any]:
    """PIL pictures of scaled latents [B, C, h, w]."""
    vae = family.pipe.vae
    with torch.inference_mode():
        images = vae.decode(latents / vae.config.scaling_factor).sample
    return family.pipe.image_processor.postprocess(images)


class Table:
    """The file of rows, and what is needed to add one."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.drawing = given, Drawing()
        self.family = StableDiffusion(load_pipeline(given.model))
        tokenizer = self.family.pipe.tokenizer
        self.subjects = read_subjects(given.subjects, one_token(tokenizer))
        check_count(given.subjects_count, self.subjects)
        self.judge = Judge(Scorer.default(), self.subjects)
        self.known = {row["key"] for row in personal_tables.read_rows(given.out)}
        if given.out.exists() and not given.out.read_bytes().endswith(b"\n"):
            append_text(given.out, "\n")  # or the next row would be lost to the torn one

    def fill(self) -> None:
        """Every row that is missing; subjects one by one, so that all methods get as far."""
        for subject in self.subjects[: self.given.subjects_count]:
            for name in CONTROLS:
                self._add(name, subject, 0, {}, {})
            for seed in self.given.seeds:
                for name in self.given.methods:
                    method = METHODS[name]
                    options = method.resolved(self.given.steps_scale, self.given.full)
                    what = facts(method, self.given.steps_scale, self.given.full)
                    self._add(name, subject, seed, what, options)
            self.write_tables()

    def write_tables(self) -> None:
        learned = {name: method.title for name, method in METHODS.items()}
        titles = CONTROLS | learned
        out = self.given.out
        rows = [row for row in personal_tables.read_rows(out) if row["method"] in titles]
        personal_tables.write(out, rows, titles, self.judge.scorer.names)
        personal_tables.write_trade(out, rows, titles)
        personal_tables.write_grid(out, rows, learned, self.subjects, self._pictures)

    @property
    def _pictures(self) -> Path:
        return self.given.work / "pictures"

    def _add(
        self, name: str, subject: Subject, seed: int, what: dict[str, Any], options: dict[str, Any]
    ) -> None:
        case = {"method": name, "subject": subject.name, "seed": seed, "facts": what}
        place = {
            "digest": subject.digest,
            "drawing": self.drawing.facts(),
            "of": len(self.subjects),
        }
        key = row_key(case | place | {"model": Path(self.given.model).name})
        if key in self.known:
            return
        if name in CONTROLS:
            figures = control(name, subject, self.family, self.judge)
        else:
            job = Job(subject, seed, self.given.model, self.given.work / "run")
            figures, sheet = measure(METHODS[name], options, job, self.judge, self.drawing)
            write_image(self._pictures / f"{key}.png", sheet.held_out[0], "work")
            lines = [("held out", sheet.held_out), *sheet.trained.items()]
            lines.append(("composed", sheet.composed))
            write_image(self._pictures / f"{key}-all.png", grid(lines, cell=64), "work")
        row = {"key": key, "method": name, "subject": subject.name, "seed": seed, **figures}
        if options:
            row["options"] = options
        append_text(self.given.out, json.dumps(row) + "\n")
        self.known.add(key)
        shown = {k: round(v, 3) for k, v in figures.items()}
        print(f"{subject.name}, seed {seed}, {name}: {shown}", flush=True)


def one_token(tokenizer: Any) -> Callable[[str], bool]:
    """Whether a word is one token of the vocabulary."""
    return lambda word: len(tokenizer.encode(word, add_special_tokens=False)) == 1


def check_count(count: int | None, subjects: Sequence[Subject]) -> None:
    if count is not None and not 1 <= count <= len(subjects):
        raise UserError(
            f"subjects_count: must be from 1 to the {len(subjects)} of the file, got {count}; "
            "leave it out to take all"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.personalization``; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.personalization")
    parser.add_argument("--subjects", type=Path, required=True, help=".npz with a .jsonl beside it")
    parser.add_argument("--model", default="persona/assets/tiny-sd", help="diffusers folder")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--subjects_count", type=int, help="the first so many; default: all")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps_scale", type=float, default=1.0, help="times the usual steps")
    length.add_argument("--full", action="store_true", help="the step counts of the papers")
    parser.add_argument("--out", type=Path, default=ROWS, help="file of rows, .jsonl")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for what runs leave")
    given = parser.parse_args(arguments)

    def run() -> None:
        given.methods = known_names("methods", given.methods, METHODS)
        given.seeds = integers(given.seeds)
        if not given.steps_scale > 0:
            raise UserError(
                f"steps_scale: must be above 0, got {given.steps_scale}; 1 is the usual budget"
            )
        make_folder(given.out.parent, "out")
        make_folder(given.work / "pictures", "work")
        Table(given).fill()

    return exit_code(run)


def exit_code(run: Callable[[], None]) -> int:
    """Of a command that makes rows: 0, 2 for a user's error, 130 for Ctrl-C."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the rows so far stay, and the same command goes on", file=sys.stderr)
        return 130
    return 0


def known_names(option: str, text: str, known: Collection[str], mark: str = ",") -> list[str]:
    """Names separated by `mark`, all of them known."""
    names = [name for name in text.split(mark) if name]
    if not names or not set(names) <= set(known):
        raise UserError(
            f"{option}: must be among {', '.join(known)}, got {text!r}; put {mark!r} between them"
        )
    return names


def integers(text: str) -> list[int]:
    """Seeds separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"seeds: must be integers separated by commas, got {text!r}; 0,1,2 is usual"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
