# SPDX-License-Identifier: Apache-2.0
"""Which noise stream a parameter has: a 32-bit number that survives resume and reordering."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from zo_kernels.estimators import check


def unique(params: Iterable[Any]) -> list[Any]:
    """Tensors, or (name, tensor) pairs, without the repetitions that tied weights cause."""
    seen: dict[int, Any] = {}
    for item in params:
        seen.setdefault(id(item[1] if isinstance(item, tuple) else item), item)
    return list(seen.values())


def name_stream(name: str) -> int:
    """The stream of a named parameter: the first 4 bytes, little endian, of SHA-256 of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def assign(
    params: Sequence[Any], given: Sequence[int] | None, taken: set[int], owner: str
) -> list[int]:
    """One new stream for each parameter: as given, else from its name, else the next free number.

    Raises:
        ValueError: too few or too many given, or one that is out of range or already taken.
    """
    if given is not None:
        streams = list(given)
        count = len(params)
        whole = len(streams) == count
        check(whole, owner, "streams", f"{count} numbers", streams, "give one for each parameter")
    elif params and all(isinstance(item, tuple) for item in params):
        streams = [name_stream(name) for name, _ in params]
    else:
        free = (s for s in range(2**32) if s not in taken)
        streams = [next(free) for _ in params]
    taken = set(taken)
    for stream in streams:
        new = 0 <= stream < 2**32 and stream not in taken
        check(new, owner, "streams", "distinct 32-bit numbers", stream, "give the group others")
        taken.add(stream)
    return streams
