# SPDX-License-Identifier: Apache-2.0
"""Writing results so that a reader never meets half a file."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from persona.errors import UserError


def make_folder(folder: Path) -> None:
    """Create ``folder`` and check that it takes files.

    Raises:
        UserError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"output_dir: must be a folder that can be written, got {folder} ({error.strerror}); "
            "choose another or change its rights"
        ) from error


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary file beside ``path``, then rename it over ``path``.

    Raises:
        UserError: the disk is full or refuses; the old file, if any, is untouched and no temporary
            file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"output_dir: {path} must be writable to the end, got {reason}; free some space or "
            "choose another --output_dir; what was there before is untouched"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomic(path, lambda p: save_file(contiguous, p, metadata=metadata))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def write_image(path: Path, image: Image.Image) -> None:
    write_atomic(path, lambda p: image.save(p, format="PNG"))
