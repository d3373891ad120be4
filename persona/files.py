# SPDX-License-Identifier: Apache-2.0
"""Writing results so that a reader never meets half a file.

`option` is what errors call the place: the option of the command that chose it.
"""

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save
from torch import Tensor

from persona.errors import UserError
from zo_kernels._files import atomic_write

OUTPUT = "output_dir"


def make_folder(folder: Path, option: str = OUTPUT) -> None:
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
            f"{option}: must be a folder that can be written, got {folder} ({error.strerror}); "
            "choose another or change its rights"
        ) from error


def write_bytes(path: Path, content: bytes, option: str = OUTPUT) -> None:
    """Write a file whole, with the rights that the umask gives.

    Raises:
        UserError: the disk is full or refuses; the old file, if any, is untouched and no temporary
            file is left.
    """
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise _refused(path, error, option) from error


def append_text(path: Path, text: str) -> None:
    """Add ``text`` to the end of a file.

    Raises:
        UserError: the disk is full or refuses; the file ends where it ended before.
    """
    end = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(text.encode())
    except OSError as error:
        if path.exists():
            os.truncate(path, end)
        raise _refused(path, error, OUTPUT) from error


def _refused(path: Path, error: OSError, option: str) -> UserError:
    return UserError(
        f"{option}: {path} must be writable to the end, got {error.strerror}; free some space "
        f"or choose another --{option}; what was there before is untouched"
    )


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], option: str = OUTPUT
) -> None:
    """A safetensors file, whole or not at all."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_bytes(path, save(contiguous, metadata=metadata), option)


def write_json(path: Path, value: Any, option: str = OUTPUT) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n", option)


def write_text(path: Path, text: str, option: str = OUTPUT) -> None:
    write_bytes(path, text.encode(), option)


def write_image(path: Path, image: Image.Image, option: str = OUTPUT) -> None:
    content = io.BytesIO()
    image.save(content, format="PNG")
    write_bytes(path, content.getvalue(), option)
