# SPDX-License-Identifier: Apache-2.0
"""The user's pictures: a folder of images, with a caption each by template or sidecar text file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from persona.errors import UserError
from persona.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TEMPLATES = {
    "photo": ("a photo of {}",),
    "object": OBJECT_TEMPLATES,
    "style": STYLE_TEMPLATES,
}


@dataclass(frozen=True)
class Example:
    """One picture and the prompts it is trained with, "{}" standing for the token."""

    path: Path
    image: Image.Image
    prompts: tuple[str, ...]


def load_folder(
    folder: Path, *, resolution: int, learnable_property: str = "object", center_crop: bool = False
) -> list[Example]:
    """Read every picture of ``folder``, resized to ``resolution`` x ``resolution``.

    ``dog.txt`` beside ``dog.png`` holds its caption, with ``{}`` where the token goes; pictures
    without one take the templates of ``learnable_property``. Transparent pictures are laid on
    white.

    Raises:
        UserError: the folder or its pictures are missing, unreadable or smaller than half the
            resolution, or a caption has no ``{}``.
    """
    if not folder.is_dir():
        raise UserError(
            f"train_data_dir: must be a folder with pictures, got {folder}; check the path"
        )
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(
            f"train_data_dir: must hold pictures ({', '.join(SUFFIXES)}), got none in {folder}; "
            "put three to five photos of the subject there"
        )
    return [
        Example(p, _read(p, resolution, center_crop), _prompts(p, learnable_property))
        for p in paths
    ]


def _read(path: Path, resolution: int, center_crop: bool) -> Image.Image:
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        raise UserError(
            f"train_data_dir: pictures must be readable, got {path} ({error}); replace or remove it"
        ) from error
    if min(picture.size) < resolution // 2:
        raise UserError(
            f"train_data_dir: pictures must be at least {resolution // 2} pixels a side for "
            f"resolution {resolution}, got {path} with {picture.width}x{picture.height}; use a "
            "larger picture or a smaller --resolution"
        )
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    if center_crop:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    return picture.resize((resolution, resolution), Image.Resampling.BICUBIC)


def _prompts(path: Path, learnable_property: str) -> tuple[str, ...]:
    sidecar = path.with_suffix(".txt")
    if not sidecar.exists():
        return TEMPLATES[learnable_property]
    try:
        caption = sidecar.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"train_data_dir: captions must be readable as UTF-8, got {sidecar} ({error}); save it "
            "anew as UTF-8 or remove it"
        ) from error
    if "{}" not in caption:
        raise UserError(
            f"train_data_dir: captions must hold {{}} where the token goes, got {caption!r} in "
            f"{sidecar}; write for example 'a photo of {{}} on a sofa'"
        )
    return (caption,)


def to_pixels(images: list[Image.Image]) -> Tensor:
    """fp32 [B, 3, H, W] in [-1, 1]."""
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1.0
