# SPDX-License-Identifier: Apache-2.0
"""Fitting the bridge and the style classifier on captioned pictures."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from persona.bridge import Bridge, Ridge, StyleClassifier, ranks, save_scorers
from persona.encoders import ImageEncoder, TextEncoder
from persona.errors import UserError
from persona.files import make_folder, write_tensors
from persona.prompts import STYLES

MOST_PICTURES = 7000
MOST_TILES = 800  # dungeon tiles teach few words
HELD_OUT = 0.1
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SAVE_EVERY = 512

Record = dict[str, Any]


def read_captioned(folder: Path) -> tuple[np.ndarray, list[Record]]:
    """uint8 [N, H, W, 3] of ``train.npz`` and a record a picture of ``train.jsonl``.

    Raises:
        UserError: a file is missing or damaged, or their lengths differ.
    """
    try:
        with np.load(folder / "train.npz") as archive:
            images = archive["images"]
        lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data: must be a folder with train.npz and train.jsonl, got {folder} ({error}); "
            "check the path"
        ) from error
    if len(records) != len(images):
        raise UserError(
            f"data: train.jsonl must have a line a picture, got {len(records)} lines for "
            f"{len(images)} pictures in {folder}; make the folder anew"
        )
    return images, records


def caption_key(caption: str) -> str:
    """Captions sorted by this stand in a random order that never changes."""
    return hashlib.sha256(caption.encode()).hexdigest()


def choose(records: Sequence[Record], count: int) -> list[int]:
    """At most ``count`` indices, whole captions in the order of ``caption_key``.

    Skin-tone variants are left out, and so are dungeon tiles past ``MOST_TILES``.
    """
    plain = [i for i, record in enumerate(records) if not record["variant"]]
    tiles = sorted(
        (i for i in plain if records[i]["style"] == "pixel tile"),
        key=lambda i: caption_key(records[i]["file"]),
    )
    dropped = set(tiles[MOST_TILES:])
    kept = (i for i in plain if i not in dropped)
    ordered = sorted(kept, key=lambda i: caption_key(records[i]["caption"]))
    return ordered[:count]


def split(records: Sequence[Record], chosen: Sequence[int]) -> int:
    """How many of the first ``chosen`` are fitted; the rest is held out and shares no caption."""
    cut = round(len(chosen) * (1 - HELD_OUT))
    while 0 < cut < len(chosen) and (
        records[chosen[cut]]["caption"] == records[chosen[cut - 1]]["caption"]
    ):
        cut -= 1
    return cut


def fit(
    data: Path,
    out: Path,
    image_encoder: ImageEncoder,
    text_encoder: TextEncoder,
    *,
    pictures: int = MOST_PICTURES,
    cache: Path | None = None,
    note: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fit both maps on at most ``pictures`` pictures of ``data``, write them, return the figures.

    A tenth of the captions is held out: their pictures choose the penalty (best mean reciprocal
    rank of the own caption; best accuracy) and give the figures. The maps saw the rest only.

    Args:
        data: folder that ``read_captioned`` reads.
        out: the safetensors file to write.
        cache: file that keeps the features, so that a later or larger run continues from it.
        note: more to keep in the file, such as how to build the encoders again.

    Raises:
        UserError: ``pictures`` is out of range, or a file cannot be read or written.
    """
    if not 20 <= pictures <= MOST_PICTURES:
        raise UserError(
            f"fit: pictures must be from 20 to {MOST_PICTURES}, got {pictures}; "
            "the default is the most"
        )
    images, records = read_captioned(data)
    make_folder(out.parent, "out")
    chosen = choose(records, pictures)
    features = _features(images, chosen, image_encoder, cache)
    captions = [records[i]["caption"] for i in chosen]
    labels = [records[i]["style"] for i in chosen]
    cut = split(records, chosen)

    candidates = sorted(set(captions[cut:]))
    unique = sorted(set(captions))
    vectors = dict(zip(unique, text_encoder.encode(unique), strict=True))
    texts = torch.stack([vectors[caption] for caption in captions])
    candidate_texts = torch.stack([vectors[caption] for caption in candidates])
    wanted = torch.tensor([candidates.index(caption) for caption in captions[cut:]])
    targets = StyleClassifier.targets(labels, STYLES)

    bridges = [
        Bridge(ridge, image_encoder.name, text_encoder.name)
        for ridge in Ridge.fit(features[:cut], texts[:cut], PENALTIES)
    ]
    classifiers = [
        StyleClassifier(ridge, image_encoder.name, STYLES)
        for ridge in Ridge.fit(features[:cut], targets[:cut], PENALTIES)
    ]
    orders = [ranks(b.pictures(features[cut:]), b.texts(candidate_texts), wanted) for b in bridges]
    accuracies = [_accuracy(c(features[cut:]), labels[cut:]) for c in classifiers]
    best = max(range(len(PENALTIES)), key=lambda i: (1 / (orders[i] + 1)).mean().item())
    best_style = max(range(len(PENALTIES)), key=lambda i: accuracies[i])

    figures = (note or {}) | {
        "fitted_pictures": cut,
        "fitted_captions": len(set(captions[:cut])),
        "heldout_pictures": len(chosen) - cut,
        "heldout_captions": len(candidates),
        "heldout_top1": round((orders[best] < 1).float().mean().item(), 4),
        "heldout_top10": round((orders[best] < 10).float().mean().item(), 4),
        "heldout_style_accuracy": round(accuracies[best_style], 4),
        "bridge_penalty": PENALTIES[best],
        "style_penalty": PENALTIES[best_style],
        "last_caption_key": caption_key(captions[-1]),
    }
    save_scorers(out, bridges[best], classifiers[best_style], figures)
    names = {"image_encoder": image_encoder.name, "text_encoder": text_encoder.name}
    return names | figures


def _accuracy(guesses: Sequence[str], labels: Sequence[str]) -> float:
    return sum(map(str.__eq__, guesses, labels)) / len(labels)


def _features(
    images: np.ndarray, chosen: Sequence[int], encoder: ImageEncoder, cache: Path | None
) -> Tensor:
    """fp32 [len(chosen), d], from ``cache`` as far as it goes."""
    known = _read_cache(cache, encoder.name)
    missing = [i for i in chosen if i not in known]
    for start in range(0, len(missing), SAVE_EVERY):
        part = missing[start : start + SAVE_EVERY]
        known |= dict(zip(part, encoder.encode(images[part]), strict=True))
        if cache is not None:
            make_folder(cache.parent, "cache")
            stacked = {
                "index": torch.tensor(list(known)),
                "features": torch.stack(list(known.values())),
            }
            write_tensors(cache, stacked, {"image_encoder": encoder.name}, "cache")
    return torch.stack([known[i] for i in chosen])


def _read_cache(cache: Path | None, name: str) -> dict[int, Tensor]:
    if cache is None or not cache.exists():
        return {}
    try:
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("image_encoder") != name:
                raise KeyError(f"features of {name}")
        tensors = load_file(cache)
        return dict(zip(tensors["index"].tolist(), tensors["features"], strict=True))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"fit: cache must hold features of {name}, got {cache} ({error}); "
            "remove it or name another"
        ) from error
