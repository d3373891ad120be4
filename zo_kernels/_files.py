# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it takes the name `path` when the block succeeds.

    The content is on the disk before the name is (fsync, then rename). When the block fails,
    whatever it wrote is removed and an older file at `path` stays as it was. The file's mode is
    what the umask gives, whatever the block did.

    Raises:
        OSError: the disk is full or refuses.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # a writer that renames its own file leaves that file's mode
        _fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # the new name itself; some file systems cannot, and it is there
        _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
