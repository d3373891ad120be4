# SPDX-License-Identifier: Apache-2.0
"""Safetensors files one tensor at a time: neither reading nor writing holds more than one."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        dtype, shape: what it is; dtype is None for one that torch does not have.
        make: gives the values, again at every call.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write(file: BinaryIO, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file; tensors are made, written and dropped one after another.

    Raises:
        TypeError: safetensors has no such dtype.
        OSError: the file cannot be written.
    """
    # Widest first, as the library orders them, so that every tensor is aligned.
    order = sorted(entries, key=lambda name: (-_size(name, entries[name]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name in order:
        entry = entries[name]
        end = position + _size(name, entry) * torch.Size(entry.shape).numel()
        header[name] = {
            "dtype": _NAMES[entry.dtype],  # type: ignore[index]
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        values = entries[name].make().detach().cpu().contiguous()
        values.reshape(-1).view(torch.uint8).numpy().tofile(file)


def _size(name: str, entry: Entry) -> int:
    if entry.dtype not in _NAMES:
        raise TypeError(
            f"save_quantized: {name} must have a dtype that safetensors stores, got {entry.dtype}; "
            "cast it"
        )
    return entry.dtype.itemsize


class TensorFiles(Mapping[str, Entry]):
    """The tensors of a safetensors file, or of the files that an index lists, by name.

    Only headers are read here. `entry.make()` maps the file, so that pages of one tensor come into
    memory, and they go with that tensor: clone one that is to stay.

    Args:
        path: a `.safetensors` file, an index (`*.safetensors.index.json`), or a folder with one
            index or else one such file.
        where: the name that messages begin with.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a folder with several, or a damaged file.
    """

    def __init__(self, path: str | os.PathLike[str], where: str) -> None:
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        self._where = where
        for file in _files(Path(path), where):
            self._read_header(file)

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                self.metadata |= opened.metadata() or {}
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    self._entries[name] = Entry(
                        _DTYPES.get(part.get_dtype()),
                        tuple(part.get_shape()),
                        lambda file=file, name=name: _read(file, name),  # type: ignore[misc]
                    )
        except SafetensorError as error:
            raise bad_file(self._where, "be a whole safetensors file", file, str(error)) from error

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:  # a mapping of its own: it goes with the tensor
        tensor: Tensor = opened.get_tensor(name)
        return tensor


def _files(path: Path, where: str) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.safetensors"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise bad_file(where, "tell which of several files it means", path, names)
        path = found[0] if found else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{where}: path must be a safetensors file, got {path}; check the path"
        )
    if not path.name.endswith(INDEX):
        return [path]
    try:
        listed = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise bad_file(where, "be an index with a weight_map", path, repr(error)) from error
    files = [path.parent / name for name in listed]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{where}: path must have all its files, got {path} without {file.name}; fetch it"
            )
    return files


def bad_file(where: str, requirement: str, path: Path, got: str) -> ValueError:
    return ValueError(
        f"{where}: path must {requirement}, got {path} ({got}); save or fetch it again"
    )
