# SPDX-License-Identifier: Apache-2.0
"""What the pictures of a personalized model are worth: a fixed set of prompts, drawn and scored."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.personal_subjects import Subject
from persona.data import to_pixels
from persona.evaluate import Scorer
from persona.families import StableDiffusion
from persona.prompts import STYLES

# What a class prompt is made into beside its style: a style or a colour that training never showed.
COMPOSITIONS = (
    ("pixel tile", "{}"),
    ("clip art", "{}"),
    ("google emoji", "red {}"),
    ("twitter emoji", "blue {}"),
    ("3d emoji", "green {}"),
    ("google emoji", "golden {}"),
)


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; a part of what a row depends on."""

    steps: int = 15
    guidance: float = 3.0
    held_out: int = 4  # pictures in the held-out style
    trained: int = 2  # in each trained style
    prior: int = 4  # of the class without the token, before and after

    def facts(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"compositions": COMPOSITIONS}


@dataclass(frozen=True)
class Sheet:
    """Pictures of one personalized model: prompts, and where each kind of picture begins."""

    held_out: list[Image.Image]
    trained: dict[str, list[Image.Image]]
    composed: list[Image.Image]


def draw(
    family: StableDiffusion, subject: Subject, word: str, seed: int, drawing: Drawing
) -> Sheet:
    """All pictures of a subject in one batch; ``word`` stands for it in the prompts.

    The noise depends on the seed alone, so that methods are compared on the same.
    """
    styles = [subject.held_out] * drawing.held_out
    styles += [style for style in subject.trained for _ in range(drawing.trained)]
    prompts = [f"a {style} of a {word}" for style in styles]
    prompts += [f"a {style} of a {what.format(word)}" for style, what in COMPOSITIONS]
    images = _sample(family, prompts, seed, drawing)
    first = drawing.held_out
    trained = {}
    for style in subject.trained:
        trained[style] = images[first : first + drawing.trained]
        first += drawing.trained
    return Sheet(images[: drawing.held_out], trained, images[first:])


def draw_prior(
    family: StableDiffusion, subject: Subject, seed: int, drawing: Drawing
) -> list[Image.Image]:
    """Pictures of the class word, in each style in turn: what personalization should not change."""
    styles = [STYLES[i % len(STYLES)] for i in range(drawing.prior)]
    return _sample(family, [f"a {s} of a {subject.word}" for s in styles], seed, drawing)


def _sample(
    family: StableDiffusion, prompts: list[str], seed: int, drawing: Drawing
) -> list[Image.Image]:
    first = 1000 * seed
    return family.sample(
        prompts, seed=first, steps=drawing.steps, guidance=drawing.guidance, batch=len(prompts)
    )


class Judge:
    """Scores sheets against the true pictures of all subjects, whose features it keeps."""

    def __init__(self, scorer: Scorer, subjects: Sequence[Subject]) -> None:
        self.scorer, self.subjects = scorer, list(subjects)
        self._true: dict[str, Tensor] = {}  # style -> features [subjects with it, d]
        self._places: dict[str, list[str]] = {}
        for style in dict.fromkeys(style for s in subjects for style in s.pictures):
            having = [s for s in subjects if style in s.pictures]
            self._true[style] = scorer.features([s.pictures[style] for s in having])
            self._places[style] = [s.name for s in having]

    def likeness(self, images: list[Image.Image], subject: Subject, style: str) -> dict[str, float]:
        """Cosine to the true picture of that style, how often it is the nearest of all subjects'
        pictures of it, and the mean cosine of two of the pictures."""
        features = self.scorer.features(images)
        cosines = self.scorer.similarity(features, self._true[style])  # [B, subjects]
        own = self._places[style].index(subject.name)
        among = self.scorer.similarity(features, features)
        count = len(images)
        pairs = (among.sum() - among.trace()) / max(1, count * (count - 1))
        return {
            "cosine": cosines[:, own].mean().item(),
            "retrieval": (cosines.argmax(1) == own).float().mean().item(),
            "alike": pairs.item(),
        }

    def scores(self, sheet: Sheet, subject: Subject) -> dict[str, float]:
        """A row's figures, but for the drift of the prior."""
        held = self.likeness(sheet.held_out, subject, subject.held_out)
        trained = [self.likeness(x, subject, style) for style, x in sheet.trained.items()]
        features = self.scorer.features(sheet.composed)
        styles = [style for style, _ in COMPOSITIONS]
        captions = [what.format(subject.word) for _, what in COMPOSITIONS]
        return {
            "fidelity": held["cosine"],
            "retrieval": held["retrieval"],
            "alike": held["alike"],
            "trained_fidelity": float(np.mean([x["cosine"] for x in trained])),
            "trained_retrieval": float(np.mean([x["retrieval"] for x in trained])),
            "style": self.scorer.style_accuracy(features, styles),
            "text": self.scorer.text(features, captions),
        }

    def control(
        self, held_out: list[Image.Image], trained: dict[str, list[Image.Image]], subject: Subject
    ) -> dict[str, float]:
        """The figures of pictures that no prompt made: those of ``scores`` that they can have."""
        held = self.likeness(held_out, subject, subject.held_out)
        others = [self.likeness(images, subject, style) for style, images in trained.items()]
        return {
            "fidelity": held["cosine"],
            "retrieval": held["retrieval"],
            "trained_fidelity": float(np.mean([x["cosine"] for x in others])),
            "trained_retrieval": float(np.mean([x["retrieval"] for x in others])),
        }

    def drift(self, before: list[Image.Image], after: list[Image.Image]) -> dict[str, float]:
        """1 - cosine and root-mean-square pixel distance (of 1) of pictures of the same noise."""
        old, new = self.scorer.features(before), self.scorer.features(after)
        cosine = torch.cosine_similarity(old, new, dim=-1).mean().item()
        distance = (to_pixels(before) - to_pixels(after)).div(2).square().mean().sqrt().item()
        return {"drift": 1 - cosine, "drift_pixels": distance}
