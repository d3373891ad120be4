# SPDX-License-Identifier: Apache-2.0
"""What a base model has learned: can its pictures be told apart by their captions?

    python -m benchmarks.base_model --data FOLDER

draws pictures for captions of the training set and for pairs of caption and style that training
never showed together, and scores them beside the real pictures. Captions come from those that the
scorers were not fitted on, so that the real pictures are no easier than the generated ones.
"""

import argparse
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from persona.bridge import load_scorers
from persona.data import to_pixels
from persona.errors import UserError
from persona.evaluate import DEFAULT_SCORERS, Scorer
from persona.families import StableDiffusion, load_pipeline
from persona.files import make_folder, write_image, write_json
from persona.fit_scorers import Record, caption_key, read_captioned
from persona.prompts import STYLES, caption_prompt
from persona.report import grid, table

DATA = Path("../shared/data/captioned64")
SHOWN = 4  # pictures a style and kind on the contact sheet


@dataclass(frozen=True)
class Case:
    """A caption in a style, and the picture of it where there is one."""

    caption: str
    style: str
    picture: Image.Image | None = None

    @property
    def prompt(self) -> str:
        return caption_prompt(self.caption, self.style)


def family(style: str) -> str:
    """Emoji sets share their captions; the other styles have their own."""
    return "emoji" if style.endswith("emoji") else style


def seen_cases(
    images: Any, records: Sequence[Record], after: str, count: int, seed: int
) -> list[Case]:
    """Pairs that training showed: distinct captions, styles in equal parts, no variants."""
    usable = (i for i, r in enumerate(records) if not r["variant"] and _usable(r["caption"], after))
    by_style: dict[str, list[int]] = {style: [] for style in STYLES}
    for i in _shuffled(usable, seed):
        by_style[records[i]["style"]].append(i)
    taken: set[str] = set()
    cases = []
    for style in _turns(count):
        index = next(
            (i for i in by_style[style] if _noun(records[i]["caption"]) not in taken), None
        )
        if index is None:
            raise _too_few(count)
        caption = records[index]["caption"]
        taken.add(_noun(caption))
        cases.append(Case(caption, style, Image.fromarray(images[index])))
    return cases


def unseen_cases(records: Sequence[Record], after: str, count: int, seed: int) -> list[Case]:
    """Captions of one family of styles in a style of another that training never showed them in.

    Keywords count as captions: training uses them as such.
    """
    taught = {
        caption_prompt(name, r["style"]) for r in records for name in (r["caption"], *r["keywords"])
    }
    sources: dict[str, set[str]] = {}
    for r in records:
        if not r["variant"] and _usable(r["caption"], after):
            sources.setdefault(r["caption"], set()).add(family(r["style"]))
    order = _shuffled(sorted(sources), seed)
    taken: set[str] = set()
    cases = []
    for style in _turns(count):
        fits = (
            c
            for c in order
            if _noun(c) not in taken
            and family(style) not in sources[c]
            and caption_prompt(c, style) not in taught
        )
        caption = next(fits, None)
        if caption is None:
            raise _too_few(count)
        taken.add(_noun(caption))
        cases.append(Case(caption, style))
    return cases


def vae_psnr(model: StableDiffusion, pictures: Sequence[Image.Image]) -> float:
    """Mean PSNR in dB of pictures through encoder and decoder, peak 255."""
    values = []
    vae = model.pipe.vae
    for start in range(0, len(pictures), 16):
        pixels = to_pixels(list(pictures[start : start + 16]))
        latents, _ = model.encode_images(pixels)
        with torch.inference_mode():
            decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
        error = (decoded.float().clamp(-1, 1) - pixels).div(2).square().mean((1, 2, 3))
        values += (-10 * error.clamp_min(1e-10).log10()).tolist()
    return sum(values) / len(values)


def scores(
    scorer: Scorer, images: Sequence[Image.Image], cases: Sequence[Case]
) -> dict[str, float]:
    """The figures of one row: pictures drawn for ``cases``, in their order."""
    features = scorer.features(images)
    captions = [case.caption for case in cases]
    top1, top5 = scorer.retrieval(features, captions)
    return {
        "top1": top1,
        "top5": top5,
        "style_accuracy": scorer.style_accuracy(features, [case.style for case in cases]),
        "text_cosine": scorer.text(features, captions),
    }


def measure(given: argparse.Namespace) -> tuple[dict[str, Any], Image.Image]:
    """All figures, and the contact sheet."""
    images, records = read_captioned(given.data)
    after = load_scorers(DEFAULT_SCORERS)[2]["last_caption_key"]
    seen = seen_cases(images, records, after, given.pictures, given.seed)
    unseen = unseen_cases(records, after, given.pictures, given.seed)
    scorer = Scorer.default()
    model = StableDiffusion(load_pipeline(given.model))
    size = (model.resolution, model.resolution)
    real = [case.picture.resize(size) for case in seen if case.picture is not None]

    def generate(cases: Sequence[Case]) -> list[Image.Image]:
        prompts = [case.prompt for case in cases]
        return model.sample(prompts, seed=given.seed, steps=given.steps, guidance=given.guidance)

    made, combined = generate(seen), generate(unseen)
    chance = {
        "top1": 1 / given.pictures,
        "top5": min(1.0, 5 / given.pictures),
        "style_accuracy": 1 / len(STYLES),
    }
    figures = {
        "encoders": scorer.names,
        "model": given.model,
        "settings": {k: getattr(given, k) for k in ("pictures", "steps", "guidance", "seed")},
        "vae_psnr_db": vae_psnr(model, real),
        "rows": {
            "chance": chance,
            "generated, seen pairs": scores(scorer, made, seen),
            "real, seen pairs (ceiling)": scores(scorer, real, seen),
            "generated, unseen pairs": scores(scorer, combined, unseen),
        },
        "prompts": {
            "seen": [case.prompt for case in seen],
            "unseen": [case.prompt for case in unseen],
        },
    }
    turns = list(_turns(given.pictures))
    sheet = []
    for style in dict.fromkeys(turns):
        places = [i for i, turn in enumerate(turns) if turn == style][:SHOWN]
        sheet.append((style, [made[i] for i in places] + [combined[i] for i in places]))
    return figures, grid(sheet)


def report(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    columns = ("top1", "top5", "style_accuracy", "text_cosine")
    rows = [
        (name, *(_shown(column, row.get(column)) for column in columns))
        for name, row in figures["rows"].items()
    ]
    n = figures["settings"]["pictures"]
    names = figures["encoders"]
    header = ("pictures", f"top-1 of {n}", f"top-5 of {n}", "style accuracy", "text cosine")
    return (
        f"{table(header, rows)}\n\nVAE PSNR on the {n} real pictures: "
        f"{figures['vae_psnr_db']:.2f} dB. "
        f"Encoders: {names['image']} (pictures), {names['text']} (texts). "
        "Unseen pairs have no real pictures, so no ceiling of their own."
    )


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if column == "text_cosine" else f"{value:.1%}"


def _turns(count: int) -> Iterable[str]:
    return (STYLES[i % len(STYLES)] for i in range(count))


def _noun(caption: str) -> str:
    return caption_prompt(caption, STYLES[0])


def _usable(caption: str, after: str) -> bool:
    return caption_key(caption) > after and _noun(caption) != caption_prompt("", STYLES[0])


def _shuffled(items: Iterable[Any], seed: int) -> list[Any]:
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _too_few(count: int) -> UserError:
    return UserError(
        f"base_model: pictures must be no more than the data has captions for, got {count}; "
        "ask for fewer"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.base_model``; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.base_model")
    parser.add_argument("--model", default="persona/assets/tiny-sd", help="diffusers folder")
    parser.add_argument("--data", type=Path, help="folder with train.npz and train.jsonl")
    parser.add_argument("--pictures", type=int, default=200, help="of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/base_model.json"))
    given = parser.parse_args(arguments)
    try:
        if given.data is None and not DATA.exists():
            raise UserError(
                "base_model: data must be given, got none; pass --data FOLDER with train.npz and "
                "train.jsonl"
            )
        given.data = given.data or DATA
        if given.pictures < 1 or given.steps < 1:
            raise UserError(
                f"base_model: pictures and steps must be at least 1, got {given.pictures} and "
                f"{given.steps}; the defaults are 200 and 20"
            )
        make_folder(given.out.parent, "out")
        figures, sheet = measure(given)
        write_json(given.out, figures, "out")
        write_image(given.out.with_suffix(".png"), sheet, "out")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(figures))
    print(f"\n{given.out} and {given.out.with_suffix('.png')}: on each row first the seen pairs.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
