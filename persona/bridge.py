# SPDX-License-Identifier: Apache-2.0
"""Two linear maps on picture features: to caption vectors (the bridge) and to styles.

They stand in for CLIP where CLIP's weights are not at hand: ridge regression from a picture
network's features to a sentence encoder's vectors puts pictures and captions into one space.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from persona.errors import UserError
from persona.files import write_tensors

VERSION = "1"


@dataclass(frozen=True)
class Ridge:
    """x [B, d] -> ((x - center [d]) / scale [d]) @ weight [d, k] + bias [k]."""

    center: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """fp32 [B, k] of x [B, d]."""
        return (x - self.center) / self.scale @ self.weight + self.bias

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, penalties: Sequence[float]) -> list["Ridge"]:
        """One map a penalty: mean square error on standardized x, plus ``penalty * |weight|^2``.

        Args:
            x: features [n, d].
            y: targets [n, k]; their mean becomes the bias, which is not penalized.
            penalties: each greater than 0.
        """
        center, scale = x.mean(0), x.std(0).clamp_min(1e-6)
        standard = ((x - center) / scale).double()
        bias = y.mean(0)
        # One eigendecomposition serves every penalty.
        values, vectors = torch.linalg.eigh(standard.T @ standard / len(x))
        moments = vectors.T @ (standard.T @ (y - bias).double()) / len(x)  # [d, k]
        return [
            cls(center, scale, (vectors @ (moments / (values[:, None] + p))).float(), bias)
            for p in penalties
        ]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """What ``from_tensors`` reads; the weight, which is large, in fp16."""
        return {
            f"{prefix}.center": self.center,
            f"{prefix}.scale": self.scale,
            f"{prefix}.weight": self.weight.half(),
            f"{prefix}.bias": self.bias,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "Ridge":
        """Raises KeyError where a tensor is missing."""
        parts = ("center", "scale", "weight", "bias")
        return cls(*(tensors[f"{prefix}.{part}"].float() for part in parts))


@dataclass(frozen=True)
class Bridge:
    """Pictures and captions in one space, for one pair of encoders that it names.

    The mean caption is subtracted on both sides: sentence vectors share a large common part that
    says nothing about the picture, and without it an unrelated caption scores near 0.
    """

    ridge: Ridge
    image_encoder: str
    text_encoder: str

    def pictures(self, features: Tensor) -> Tensor:
        """Unit vectors [B, k] of picture features [B, d]."""
        return F.normalize(self.ridge(features) - self.ridge.bias, dim=-1)

    def texts(self, vectors: Tensor) -> Tensor:
        """Unit vectors [B, k] of the text encoder's vectors [B, k]."""
        return F.normalize(vectors - self.ridge.bias, dim=-1)


@dataclass(frozen=True)
class StyleClassifier:
    """Picture features to styles: ridge regression, one against all."""

    ridge: Ridge
    image_encoder: str
    styles: tuple[str, ...]

    @staticmethod
    def targets(labels: Sequence[str], styles: Sequence[str]) -> Tensor:
        """fp32 [B, len(styles)]: 1 at the style, -1 elsewhere."""
        index = torch.tensor([styles.index(label) for label in labels])
        return F.one_hot(index, len(styles)).float() * 2 - 1

    def __call__(self, features: Tensor) -> list[str]:
        """One style a row of picture features [B, d]."""
        return [self.styles[i] for i in self.ridge(features).argmax(-1).tolist()]


def ranks(pictures: Tensor, texts: Tensor, wanted: Tensor) -> Tensor:
    """How many texts are nearer to each picture than the wanted one: int64 [B], 0 is best.

    Args:
        pictures: unit vectors [B, k].
        texts: unit vectors [N, k].
        wanted: int64 [B], index of each picture's own text. Of equal cosines half count as nearer.
    """
    cosines = pictures @ texts.T  # [B, N]
    own = cosines.gather(1, wanted[:, None])
    ahead = (cosines > own).sum(1)
    level = (cosines == own).sum(1) - 1
    return ahead + level.div(2, rounding_mode="floor")


def save_scorers(
    path: Path, bridge: Bridge, classifier: StyleClassifier, metadata: dict[str, Any]
) -> None:
    """One safetensors file with both maps and what ``metadata`` says of them.

    Raises:
        UserError: the file cannot be written; an older one stays as it was.
    """
    facts = metadata | {
        "version": VERSION,
        "image_encoder": bridge.image_encoder,
        "text_encoder": bridge.text_encoder,
        "styles": list(classifier.styles),
    }
    tensors = bridge.ridge.tensors("bridge") | classifier.ridge.tensors("style")
    metadata = {name: json.dumps(value) for name, value in facts.items()}
    write_tensors(path, tensors, metadata, "out")


def load_scorers(path: Path) -> tuple[Bridge, StyleClassifier, dict[str, Any]]:
    """What ``save_scorers`` wrote.

    Raises:
        UserError: the file is missing, damaged or not of this kind.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        image_encoder, styles = facts["image_encoder"], tuple(facts["styles"])
        bridge = Bridge(Ridge.from_tensors(tensors, "bridge"), image_encoder, facts["text_encoder"])
        classifier = StyleClassifier(Ridge.from_tensors(tensors, "style"), image_encoder, styles)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"scorers: must be a file of fitted scorers, got {path} ({error}); make one with "
            "python -m persona.evaluate fit"
        ) from error
    return bridge, classifier, facts
