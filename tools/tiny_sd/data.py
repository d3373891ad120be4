# SPDX-License-Identifier: Apache-2.0
"""The captioned 64x64 pictures that tiny-sd is trained on, and how often each is drawn.

A data folder holds ``train.npz`` (``images``: uint8 [N, 64, 64, 3]) and ``train.jsonl`` (one object
a
line, same order: caption, keywords, style, variant, ...). ``tools/tiny_sd/dataset.py`` rebuilds it
from public packages.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from persona.prompts import caption_prompt

# A picture is drawn in proportion to these: 3560 dungeon tiles and 4594 skin-tone variants would
# otherwise be almost half of what the model sees, and they teach few words.
STYLE_WEIGHT = {
    "google emoji": 1.0,
    "twitter emoji": 1.0,
    "3d emoji": 1.0,
    "clip art": 0.3,
    "pixel tile": 0.15,
}
VARIANT_WEIGHT = 0.02


@dataclass
class Pictures:
    """images: uint8 [N, 64, 64, 3]; one record and one sampling weight a picture."""

    images: np.ndarray
    records: list[dict]
    weights: Tensor

    def __len__(self) -> int:
        return len(self.records)

    def pixels(self, index: Tensor) -> Tensor:
        """Pictures ``index`` [B] as fp32 [B, 3, 64, 64] in [-1, 1], channels last in memory."""
        x = torch.from_numpy(self.images[index.numpy()]).permute(0, 3, 1, 2)
        return x.to(torch.float32).div_(127.5).sub_(1.0)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices [count], drawn with replacement by weight."""
        return torch.multinomial(self.weights, count, replacement=True, generator=generator)

    def prompt(self, index: int, generator: torch.Generator) -> str:
        """A prompt for picture ``index``: its caption, now and then one of its keywords instead."""
        record = self.records[index]
        names = [record["caption"]]
        if _uniform(generator) < 0.2:
            names = [k for k in record["keywords"] if 2 < len(k) < 30] or names
        name = names[int(_uniform(generator) * len(names))]
        return caption_prompt(name, record["style"])


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator).item()


def load(folder: Path) -> Pictures:
    """Read ``train.npz`` and ``train.jsonl`` of ``folder``.

    Raises:
        FileNotFoundError: one of the two is missing.
        ValueError: they disagree about the number of pictures.
    """
    images = np.load(folder / "train.npz")["images"]
    with open(folder / "train.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    if len(records) != len(images):
        raise ValueError(
            f"load: {folder} must hold one line a picture, got {len(images)} pictures and "
            f"{len(records)} lines; rebuild it with python -m tools.tiny_sd.dataset"
        )
    weights = torch.tensor(
        [STYLE_WEIGHT[r["style"]] * (VARIANT_WEIGHT if r["variant"] else 1.0) for r in records]
    )
    return Pictures(images, records, weights)
