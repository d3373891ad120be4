# SPDX-License-Identifier: Apache-2.0
"""A run's state in one small safetensors file: kilobytes, whole or not at all, exact."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from persona.errors import UserError
from persona.files import write_tensors

FORMAT = "persona-checkpoint-2"


def save(path: Path, tensors: dict[str, Tensor], step: int, recipe: dict[str, Any]) -> None:
    """Write ``tensors``, the number of finished steps, and the options that a resume must share."""
    header = {"step": str(step), "recipe": json.dumps(recipe, sort_keys=True)}
    digest = _digest(tensors, header)
    write_tensors(path, tensors, header | {"format": FORMAT, "sha256": digest})


def load(path: Path, recipe: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The tensors and step of a checkpoint that was made with the same ``recipe``.

    Raises:
        UserError: there is none, it cannot be read, or it was made with other options.
    """
    if not path.exists():
        raise UserError(
            f"resume_from_checkpoint: must find a checkpoint, got none at {path}; "
            "start without --resume"
        )
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"resume_from_checkpoint: must be a readable checkpoint, got {path} "
            f"({error}); start without --resume"
        ) from error
    if header.pop("format", None) != FORMAT:
        raise UserError(
            f"resume_from_checkpoint: must be a checkpoint of format {FORMAT}, got another file "
            f"at {path}; start without --resume"
        )
    if header.pop("sha256", None) != _digest(tensors, header):
        raise UserError(
            f"resume_from_checkpoint: must be as it was written, got {path} with other content "
            "than its checksum says; start without --resume"
        )
    theirs = json.loads(header["recipe"])
    changed = sorted(k for k in recipe.keys() | theirs.keys() if recipe.get(k) != theirs.get(k))
    if changed:
        name = changed[0]
        raise UserError(
            f"{name}: must be {theirs.get(name)!r} as in the checkpoint to resume, got "
            f"{recipe.get(name)!r}; use the same options or another --output_dir"
        )
    return tensors, int(header["step"])


def _digest(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    text = json.dumps(header, sort_keys=True).encode()
    return hashlib.sha256(save_tensors(tensors) + text).hexdigest()
