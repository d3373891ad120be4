# SPDX-License-Identifier: Apache-2.0
"""How good pictures are: likeness to a subject, fit to a text, style. Encoders are arguments.

``python -m persona.evaluate fit --data FOLDER`` fits the maps that ship with the package anew.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from persona.bridge import Bridge, StyleClassifier, load_scorers, ranks
from persona.encoders import EfficientNetLite2, ImageEncoder, MiniLM, Pictures, TextEncoder
from persona.errors import UserError
from persona.fit_scorers import MOST_PICTURES, fit
from persona.report import table

DEFAULT_SCORERS = Path(str(files("persona"))) / "assets" / "scorers" / "lite2-minilm.safetensors"
Scored = Pictures | Tensor  # pictures, or their features [B, d]


class Scorer:
    """Scores of pictures. Where a method takes pictures, the result of ``features`` does as well.

    Args:
        image_encoder: pictures to features.
        text_encoder: texts to vectors; needed by ``text`` and ``retrieval``.
        bridge: picture features to the text encoder's vectors; None where both encoders share a
            space already, as CLIP's do.
        classifier: needed by ``style_accuracy``.

    Raises:
        UserError: ``bridge`` or ``classifier`` was fitted for other encoders.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder | None = None,
        bridge: Bridge | None = None,
        classifier: StyleClassifier | None = None,
    ) -> None:
        for part in (bridge, classifier):
            if part is not None and part.image_encoder != image_encoder.name:
                raise UserError(
                    f"Scorer: image_encoder must be {part.image_encoder}, which the maps were "
                    f"fitted for, got {image_encoder.name}; fit new ones with "
                    "python -m persona.evaluate fit"
                )
        if bridge and text_encoder and bridge.text_encoder != text_encoder.name:
            raise UserError(
                f"Scorer: text_encoder must be {bridge.text_encoder}, which the bridge was fitted "
                f"for, got {text_encoder.name}; fit a new one with python -m persona.evaluate fit"
            )
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.bridge = bridge
        self.classifier = classifier

    @classmethod
    def default(cls, scorers: Path = DEFAULT_SCORERS) -> "Scorer":
        """EfficientNet-Lite2 and MiniLM with the maps that ship; weights load at first use.

        Raises:
            UserError: the packages of the extra ``eval``, or the file ``scorers``, are missing.
        """
        bridge, classifier, facts = load_scorers(scorers)
        image_encoder = EfficientNetLite2(size=facts["input_size"])
        return cls(image_encoder, MiniLM(), bridge, classifier)

    @property
    def names(self) -> dict[str, str]:
        """What a figure must carry: ``{"image": ..., "text": ...}``."""
        text = "none" if self.text_encoder is None else self.text_encoder.name
        return {"image": self.image_encoder.name, "text": text}

    def features(self, images: Scored) -> Tensor:
        """fp32 [B, d] of B pictures; a tensor is taken to be features and passes."""
        return images if isinstance(images, Tensor) else self.image_encoder.encode(images)

    def similarity(self, images: Scored, references: Scored) -> Tensor:
        """Cosines of features, fp32 [len(images), len(references)], from -1 to 1."""
        left, right = (F.normalize(self.features(x), dim=-1) for x in (images, references))
        return left @ right.T

    def subject(self, images: Scored, references: Scored) -> float:
        """Mean cosine over all pairs, as DreamBooth (Ruiz et al. 2023) scores subjects."""
        return self.similarity(images, references).mean().item()

    def text(self, images: Scored, captions: Sequence[str]) -> float:
        """Mean cosine of each picture, brought into the text encoder's space, with its caption.

        Raises:
            UserError: counts differ, or there is no text encoder or way into its space.
        """
        _same_count("Scorer.text", captions, images)
        pictures, texts = self._shared_space(images, captions)
        return (pictures * texts).sum(-1).mean().item()

    def retrieval(self, images: Scored, captions: Sequence[str]) -> tuple[float, float]:
        """How often a picture's own caption comes first, and among the first five.

        Candidates are all distinct captions; chance is 1 / n and 5 / n.

        Raises:
            UserError: as ``text``.
        """
        _same_count("Scorer.retrieval", captions, images)
        candidates = sorted(set(captions))
        pictures, texts = self._shared_space(images, candidates)
        wanted = torch.tensor([candidates.index(caption) for caption in captions])
        found = ranks(pictures, texts, wanted)
        return (found < 1).float().mean().item(), (found < 5).float().mean().item()

    def style_accuracy(self, images: Scored, styles: Sequence[str]) -> float:
        """The share of pictures that the classifier puts into their style.

        Raises:
            UserError: counts differ, no classifier, or a style that it does not know.
        """
        _same_count("Scorer.style_accuracy", styles, images)
        if self.classifier is None:
            raise UserError(
                "Scorer.style_accuracy: classifier must be given, got None; fit one with "
                "python -m persona.evaluate fit"
            )
        unknown = sorted(set(styles) - set(self.classifier.styles))
        if unknown:
            raise UserError(
                f"Scorer.style_accuracy: styles must be among {', '.join(self.classifier.styles)}, "
                f"got {', '.join(unknown)}; leave those pictures out"
            )
        guesses = self.classifier(self.features(images))
        hits = sum(guess == style for guess, style in zip(guesses, styles, strict=True))
        return hits / len(styles)

    def _shared_space(self, images: Scored, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit vectors of pictures and of texts that can be compared."""
        if self.text_encoder is None:
            raise UserError("Scorer: text_encoder must be given to score texts, got None; pass one")
        features, vectors = self.features(images), self.text_encoder.encode(texts)
        if self.bridge is not None:
            return self.bridge.pictures(features), self.bridge.texts(vectors)
        if features.shape[1] != vectors.shape[1]:
            raise UserError(
                f"Scorer: bridge must be given where encoders do not share a space, got None with "
                f"{features.shape[1]} picture and {vectors.shape[1]} text features; fit one with "
                "python -m persona.evaluate fit"
            )
        return F.normalize(features, dim=-1), F.normalize(vectors, dim=-1)


def _same_count(method: str, texts: Sequence[str], images: Scored) -> None:
    if len(texts) != len(images) or len(texts) == 0:
        raise UserError(
            f"{method}: texts must be one a picture, got {len(texts)} for {len(images)} pictures; "
            "repeat a text for each of its pictures"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m persona.evaluate fit``; the exit code."""
    parser = argparse.ArgumentParser(prog="persona.evaluate", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser("fit", help="fit bridge and styles")
    command.add_argument("--data", type=Path, required=True, help="holds train.npz and train.jsonl")
    command.add_argument("--out", type=Path, default=DEFAULT_SCORERS)
    command.add_argument("--pictures", type=int, default=MOST_PICTURES)
    command.add_argument("--size", type=int, default=128, help="pixels a side, network input")
    command.add_argument("--cache", type=Path, help="file that keeps picture features between runs")
    given = parser.parse_args(arguments)
    try:
        facts = fit(
            given.data,
            given.out,
            EfficientNetLite2(given.size),
            MiniLM(),
            pictures=given.pictures,
            cache=given.cache,
            note={"input_size": given.size},
        )
    except UserError as error:
        print(f"persona: {error}", file=sys.stderr)
        return 2
    print(table(("what", "value"), [(name, str(value)) for name, value in facts.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
