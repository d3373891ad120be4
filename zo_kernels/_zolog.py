# SPDX-License-Identifier: Apache-2.0
"""The file of a trajectory: what decided every update of a run, a few dozen bytes a step.

Little endian throughout:

    file    magic[8]  version u32  length u32  header[length] (JSON)  crc u32 (of all before it)
            record*
    record  type u8  length u32  payload[length]  crc u32 (of the record, seeded by the header's)

| type | record    | payload                                                                     |
|------|-----------|-----------------------------------------------------------------------------|
| 1    | `Step`    | draw i64, n u16, c_j f64 [groups, n], (group u16, field u8, value f64)*      |
| 2    | `Trained` | one bit for each tensor of the table, the lowest first                      |
| 3    | `Quanta`  | (tensor u32, quantum f64)*                                                  |
| 4    | `Digest`  | draw i64, SHA-256 [32]                                                      |

A step is 27 bytes and 8 for each further coefficient; it repeats no setting that has not changed,
and a changed one takes 11. A record is whole or it does not count: the first one that is not ends
the log, unless whole ones follow it, for then the file is damaged and not torn.

This module needs neither torch nor numpy.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

MAGIC = b"ZOLOG\r\n\x1a"  # like that of PNG, it shows what a text-mode copy has done
VERSION = 1
CONTRACT = 1  # of `zo_kernels.rng` and of the arithmetic of the updates: the same bits
# Rounding takes its random bits from the draws that no direction has: those with the top bit set.
ROUNDING = -(2**63)

# What an update reads of a group, besides the coefficients; the position is the field in the file.
SETTINGS = {
    "ZOSGD": ("lr", "momentum", "weight_decay"),
    "ZOSignSGD": ("lr", "momentum", "weight_decay"),
    "ZOAdam": ("lr", "beta1", "beta2", "adam_eps", "weight_decay"),
}

_OPENING, _CRC = struct.Struct("<8sII"), struct.Struct("<I")
_HEAD, _STEP, _CHANGE = struct.Struct("<BI"), struct.Struct("<qH"), struct.Struct("<HBd")
_QUANTUM, _DIGEST = struct.Struct("<Id"), struct.Struct("<q32s")


@dataclass(frozen=True)
class Step:
    """An accepted update.

    Attributes:
        draw: the first of its n directions.
        coeffs: [groups][n], what the update multiplied the directions with, before lr.
        settings: (group, name) -> the value from this step on, for those that have changed.
    """

    draw: int
    coeffs: list[list[float]]
    settings: dict[tuple[int, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """The later updates are of these tensors of the table."""

    tensors: tuple[int, ...]


@dataclass(frozen=True)
class Quanta:
    """These tensors move to the nearest point of a new grid now, 0 for none, and stay on it."""

    quanta: dict[int, float]


@dataclass(frozen=True)
class Digest:
    """SHA-256, in hex, of all tensors trained so far, in table order, at the optimizer's `draw`."""

    draw: int
    sha256: str


Record = Step | Trained | Quanta | Digest


@dataclass(frozen=True)
class Entry:
    """A record, where it ends in the file, and the draw after it (None: it opens a step)."""

    record: Record
    end: int
    after: int | None


@dataclass(frozen=True)
class Trajectory:
    """A log; iterating gives its records.

    Attributes:
        header: optimizer, seed, kind, and what else is constant; "tensors" is the table.
        entries: the whole records.
        start: where the first of them begins, in bytes.
        crc: that of the header.
    """

    header: dict[str, Any]
    entries: list[Entry]
    start: int
    crc: int

    def __iter__(self) -> Iterator[Record]:
        return (entry.record for entry in self.entries)

    def up_to(self, draw: int | None) -> Trajectory:
        """What was decided when the optimizer's counter was `draw`; None for all."""
        ends = [
            i + 1
            for i, entry in enumerate(self.entries)
            if entry.after is not None and (draw is None or entry.after <= draw)
        ]
        kept = self.entries[: ends[-1] if ends else 0]
        return Trajectory(self.header, kept, self.start, self.crc)

    @property
    def end(self) -> int:
        """The length in bytes of the part that is whole."""
        return self.entries[-1].end if self.entries else self.start

    @property
    def updates(self) -> int:
        """Number of updates that it holds."""
        return sum(isinstance(record, Step) for record in self)


def check(ok: bool, owner: str, name: str, requirement: str, value: object, advice: str) -> None:
    """Raises ValueError in the package's error grammar unless `ok`."""
    if not ok:
        raise ValueError(f"{owner}: {name} must be {requirement}, got {value}; {advice}")


def pack_header(header: dict[str, Any]) -> bytes:
    """How a log with this header begins."""
    text = json.dumps(header, separators=(",", ":")).encode()
    data = _OPENING.pack(MAGIC, VERSION, len(text)) + text
    return data + _CRC.pack(zlib.crc32(data))


def pack(record: Record, header: dict[str, Any], crc: int) -> bytes:
    """A record as the bytes to append to the log with this header, whose CRC is `crc`."""
    kind, payload = _payload(record, header)
    data = _HEAD.pack(kind, len(payload)) + payload
    return data + _CRC.pack(zlib.crc32(data, crc))


def _payload(record: Record, header: dict[str, Any]) -> tuple[int, bytes]:
    if isinstance(record, Step):
        numbers = [c for row in record.coeffs for c in row]
        fields = SETTINGS[header["optimizer"]]
        changes = [
            _CHANGE.pack(group, fields.index(name), value)
            for (group, name), value in record.settings.items()
        ]
        head = _STEP.pack(record.draw, len(record.coeffs[0]))
        return 1, head + struct.pack(f"<{len(numbers)}d", *numbers) + b"".join(changes)
    if isinstance(record, Trained):
        bits = sum(1 << i for i in record.tensors)
        return 2, bits.to_bytes(-(-len(header["tensors"]) // 8), "little")
    if isinstance(record, Quanta):
        return 3, b"".join(_QUANTUM.pack(i, q) for i, q in record.quanta.items())
    return 4, _DIGEST.pack(record.draw, bytes.fromhex(record.sha256))


def _record(kind: int, payload: bytes, header: dict[str, Any]) -> tuple[Record, int | None]:
    """The record, and the draw after it."""
    if kind == 1:
        draw, n = _STEP.unpack_from(payload)
        groups = len(header["groups"])
        end = _STEP.size + 8 * n * groups
        numbers = struct.unpack(f"<{n * groups}d", payload[_STEP.size : end])
        coeffs = [list(numbers[g * n : (g + 1) * n]) for g in range(groups)]
        fields = SETTINGS[header["optimizer"]]
        changes = _CHANGE.iter_unpack(payload[end:])
        return Step(draw, coeffs, {(g, fields[i]): v for g, i, v in changes}), draw + n
    if kind == 2:
        bits = int.from_bytes(payload, "little")
        return Trained(tuple(i for i in range(bits.bit_length()) if bits >> i & 1)), None
    if kind == 3:
        return Quanta(dict(_QUANTUM.iter_unpack(payload))), None
    draw, digest = _DIGEST.unpack(payload)
    return Digest(draw, digest.hex()), draw


def read(path: str | PathLike[str]) -> Trajectory:
    """The log at `path`, without a last record that a crash left incomplete.

    Raises:
        ValueError: not a log, or damaged before its last record, or of a version this is not.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    header, start, crc = _read_header(data, path)
    entries: list[Entry] = []
    at, last = start, -1
    while (whole := _whole(data, at, crc)) is not None:
        kind, payload, at = whole
        record, after = _record(kind, payload, header)
        if after is not None:
            ordered = last <= (record.draw if isinstance(record, Step) else after)
            check(ordered, "read", "path", "a log in the order of its draws", path, _DAMAGED)
            last = after
        entries.append(Entry(record, at, after))
    more = any(_whole(data, later, crc) for later in range(at + 1, len(data)))
    bound = f"whole up to its last record, unlike byte {at} of {len(data)}"
    check(not more, "read", "path", bound, path, _DAMAGED)
    return Trajectory(header, entries, start, crc)


_DAMAGED = "the file is damaged, take a copy of it"


def _read_header(data: bytes, path: object) -> tuple[dict[str, Any], int, int]:
    magic, version, length = MAGIC, VERSION, 0
    if len(data) >= _OPENING.size:
        magic, version, length = _OPENING.unpack_from(data)
    start = _OPENING.size + length + _CRC.size
    check(data[:8] == MAGIC == magic, "read", "path", "a log of a trajectory", path, "name another")
    advice = "install the zo_kernels that wrote it"
    check(version == VERSION, "read", "version", f"{VERSION}, as here", version, advice)
    whole = len(data) >= start
    crc = zlib.crc32(data[: start - _CRC.size])
    whole = whole and _CRC.pack(crc) == data[start - _CRC.size : start]
    check(whole, "read", "path", "a log with a whole header", path, _DAMAGED)
    header = json.loads(data[_OPENING.size : start - _CRC.size])
    contract = header["contract"]
    check(contract == CONTRACT, "read", "contract", f"{CONTRACT}, as here", contract, advice)
    return header, start, crc


def _whole(data: bytes, at: int, crc: int) -> tuple[int, bytes, int] | None:
    """Type, payload and end of the record at `at`, or None if there is no whole one."""
    if at + _HEAD.size > len(data):
        return None
    kind, length = _HEAD.unpack_from(data, at)
    end = at + _HEAD.size + length + _CRC.size
    if not 1 <= kind <= 4 or end > len(data):
        return None
    body = data[at : end - _CRC.size]
    if _CRC.pack(zlib.crc32(body, crc)) != data[end - _CRC.size : end]:
        return None
    return kind, body[_HEAD.size :], end
