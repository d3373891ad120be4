# SPDX-License-Identifier: Apache-2.0
"""Subjects of the personalization benchmark: two styles to train on, a third to be generated."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from persona.errors import UserError
from persona.files import make_folder, write_image, write_text
from persona.prompts import STYLES

FALLBACK = "object"  # class word where no keyword is one token


@dataclass(frozen=True)
class Subject:
    """A thing in several styles.

    Attributes:
        name: its caption, such as "izakaya lantern"; no prompt of a method says it.
        word: one token for its class, such as "light": what a user would initialize with.
        pictures: style to picture; the last style is held out.
    """

    name: str
    word: str
    pictures: dict[str, Image.Image]

    @property
    def held_out(self) -> str:
        return list(self.pictures)[-1]

    @property
    def trained(self) -> list[str]:
        return list(self.pictures)[:-1]

    @property
    def digest(self) -> str:
        """Of everything that a run depends on."""
        state = hashlib.sha256(self.word.encode())
        for style, picture in self.pictures.items():
            state.update(style.encode() + picture.tobytes())
        return state.hexdigest()[:16]

    def write(self, folder: Path) -> Path:
        """Make the folder that a user would have: a picture and its caption a trained style."""
        make_folder(folder)
        for style in self.trained:
            stem = style.replace(" ", "-")
            write_image(folder / f"{stem}.png", self.pictures[style])
            write_text(folder / f"{stem}.txt", f"a {style} of a {{}}\n")
        return folder


def read_subjects(path: Path, one_token: Callable[[str], bool]) -> list[Subject]:
    """The subjects of ``path`` and of the .jsonl beside it.

    Args:
        path: .npz with ``images``, uint8 [n, H, W, 3]; the .jsonl of the same name has an object a
            picture with ``caption``, ``style``, ``keywords`` and, if the class word is not to come
            from the keywords, ``word``. Consecutive pictures of a caption are a subject, the last
            of them held out.
        one_token: whether a word is one token of the model's vocabulary.

    Raises:
        UserError: a file is missing or not of this form.
    """
    notes = path.with_suffix(".jsonl")
    try:
        images = np.load(path)["images"]
        records = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
        captions = [(record["caption"], record["style"]) for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"subjects: must be an .npz of images with a .jsonl of captions beside it, got {path} "
            f"({error}); see benchmarks/personal_subjects.py for the form"
        ) from error
    if len(images) != len(records):
        raise UserError(
            f"subjects: must have a line of {notes.name} a picture, got {len(records)} for "
            f"{len(images)} pictures; make both from the same list"
        )
    unknown = sorted({style for _, style in captions} - set(STYLES))
    if unknown:
        raise UserError(
            f"subjects: styles must be among {', '.join(STYLES)}, got {', '.join(unknown)}; the "
            "scorer knows no others"
        )
    subjects = []
    for name, rows in _runs([caption for caption, _ in captions]):
        pictures = {records[i]["style"]: Image.fromarray(images[i]) for i in rows}
        if len(pictures) < 2:
            raise UserError(
                f"subjects: {name!r} must have two styles or more, got {len(pictures)}; one is "
                "held out"
            )
        subjects.append(Subject(name, class_word(records[rows[0]], one_token), pictures))
    return subjects


def class_word(record: dict[str, Any], one_token: Callable[[str], bool]) -> str:
    """The first keyword of one token that shares no word with the caption, which the base model may
    not know; else the last word of ``sub``; else ``FALLBACK``."""
    if record.get("word"):
        return record["word"]
    own = set(record["caption"].lower().split())
    keywords = (k.lower() for k in record.get("keywords", ()))
    fits = [k for k in keywords if k.isalpha() and k not in own and one_token(k)]
    last = str(record.get("sub", "")).split("-")[-1].split(" ")[-1]
    return next(iter([*fits, *([last] if last and one_token(last) else [])]), FALLBACK)


def _runs(names: Iterable[str]) -> list[tuple[str, list[int]]]:
    """Consecutive equal names with their places."""
    runs: list[tuple[str, list[int]]] = []
    for i, name in enumerate(names):
        if runs and runs[-1][0] == name:
            runs[-1][1].append(i)
        else:
            runs.append((name, [i]))
    return runs
