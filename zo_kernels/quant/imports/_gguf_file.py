# SPDX-License-Identifier: Apache-2.0
"""`GGUF`: the container of ggml, and what its Q8_0 and Q4_0 tensors hold.

A file is a header, typed key-value pairs, a table of tensors and their data, little endian; shapes
run backwards, rows are contiguous. Both formats cut a row into blocks of 32:

    Q8_0  fp16 d, 32 x int8 q                       w = d * q
    Q4_0  fp16 d, 16 bytes: low nibbles are u[0:16], high nibbles u[16:32];   w = d * (u - 8)

Written from the format's description (ggml's docs/gguf.md, ggml-quants.c). ComfyUI's converters cut
rows that 256 does not divide anew, and keep the shape as `comfy.gguf.orig_shape.<tensor>`; the
order of the elements is the same.
"""

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
BITS = {"Q8_0": 8, "Q4_0": 4}
# ggml's type -> name, elements of a block, bytes of a block, dtype where it is one of torch.
_TYPES: dict[int, tuple[str, int, int, torch.dtype | None]] = {
    0: ("F32", 1, 4, torch.float32),
    1: ("F16", 1, 2, torch.float16),
    2: ("Q4_0", BLOCK, 18, None),
    8: ("Q8_0", BLOCK, 34, None),
    24: ("I8", 1, 1, torch.int8),
    25: ("I16", 1, 2, torch.int16),
    26: ("I32", 1, 4, torch.int32),
    27: ("I64", 1, 8, torch.int64),
    28: ("F64", 1, 8, torch.float64),
    30: ("BF16", 1, 2, torch.bfloat16),
}
# Type of a value -> how struct reads it; 8 is a string and 9 an array.
_SCALARS = dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"]))
_SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """A row of the file's table.

    Attributes:
        kind: "F32", "Q8_0", ...; "type <n>" for one that cannot be read here.
        shape: in torch's order; the original one where ComfyUI keeps it.
        offset: of the data in the file.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int


class GGUF:
    """A GGUF file: its metadata and tensors, which are read when asked for.

    Attributes:
        metadata: key -> value; arrays are lists.
        tensors: name -> `GGUFTensor`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF, of another version than 2 or 3, big-endian, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"GGUF: path must be a file, got {path}; check the path")
        self._size = self.path.stat().st_size
        with self.path.open("rb") as file:
            try:
                self.metadata, self.tensors = self._parse(file)
            except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
                raise self._bad("be a whole file", repr(error)) from error
        for name, tensor in self.tensors.items():
            if tensor.offset + (self._bytes(tensor) or 0) > self._size:
                raise self._bad("be a whole file", f"{name} beyond its {self._size} bytes")

    def codes(self, name: str) -> Tensor:
        """Codes of a Q8_0 or Q4_0 tensor, int8 in its shape."""
        blocks = self._blocks(name)[:, 2:]
        if self.tensors[name].kind == "Q8_0":
            codes = blocks.view(np.int8)
        else:
            codes = np.concatenate((blocks & 15, blocks >> 4), axis=1).astype(np.int8) - np.int8(8)
        return torch.from_numpy(np.array(codes)).reshape(self.tensors[name].shape)

    def scales(self, name: str) -> Tensor:
        """fp32 [elements / 32]: one scale for each 32 codes in row-major order."""
        scales = np.ascontiguousarray(self._blocks(name)[:, :2]).view("<f2")
        return torch.from_numpy(scales.astype(np.float32)).reshape(-1)

    def values(self, name: str) -> Tensor:
        """The values of a tensor: in its own dtype, or the fp32 that a quantized one stands for.

        Raises:
            ValueError: its type cannot be read here.
        """
        tensor = self.tensors[name]
        if tensor.kind in BITS:
            blocks = self.codes(name).reshape(-1, BLOCK)
            return (blocks * self.scales(name)[:, None]).reshape(tensor.shape)
        dtype = self.dtype(name)
        raw = np.fromfile(self.path, np.uint8, self._bytes(tensor) or 0, offset=tensor.offset)
        return torch.from_numpy(raw).view(dtype).reshape(tensor.shape)

    def dtype(self, name: str) -> torch.dtype:
        """What `values` gives.

        Raises:
            ValueError: its type cannot be read here.
        """
        kind = self.tensors[name].kind
        for known, _, _, dtype in _TYPES.values():
            if known == kind:
                return dtype or torch.float32
        readable = ", ".join(row[0] for row in _TYPES.values())
        raise ValueError(
            f"GGUF: {name} must be one of {readable}, got {kind} in {self.path}; "
            "convert the model to Q8_0 or Q4_0"
        )

    def _blocks(self, name: str) -> Any:
        """The bytes of a quantized tensor, a row for each block: a map of the file."""
        tensor = self.tensors[name]
        size = self._bytes(tensor) or 0
        width = 34 if tensor.kind == "Q8_0" else 18
        if not size:
            return np.empty((0, width), np.uint8)
        return np.memmap(self.path, np.uint8, "r", tensor.offset, (size // width, width))

    @staticmethod
    def _bytes(tensor: GGUFTensor) -> int | None:
        for name, elements, size, _ in _TYPES.values():
            if name == tensor.kind:
                return math.prod(tensor.shape) // elements * size
        return None

    def _parse(self, file: BinaryIO) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        if file.read(4) != b"GGUF":
            raise self._bad("be a GGUF file", "another first word")
        (version,) = struct.unpack("<I", file.read(4))
        if version not in (2, 3):
            # The other byte order puts the number into the upper half.
            got = "big-endian data" if version & 0xFFFF == 0 else f"version {version}"
            raise self._bad("have version 2 or 3, little endian", got)
        tensors, pairs = struct.unpack("<QQ", file.read(16))
        metadata = {self._string(file): self._value(file) for _ in self._count(pairs)}
        table = [self._row(file) for _ in self._count(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._bad("have a positive alignment", repr(alignment))
        start = -(-file.tell() // alignment) * alignment
        return metadata, {
            name: GGUFTensor(kind, self._original(metadata, name, shape), start + offset)
            for name, kind, shape, offset in table
        }

    def _original(
        self, metadata: dict[str, Any], name: str, shape: tuple[int, ...]
    ) -> tuple[int, ...]:
        original = metadata.get(f"comfy.gguf.orig_shape.{name}")
        if original is None:
            return shape
        whole = isinstance(original, list) and all(isinstance(size, int) for size in original)
        if not whole or math.prod(original) != math.prod(shape):
            raise self._bad("hold shapes that agree", f"{name} {shape}, originally {original}")
        return tuple(original)

    def _count(self, count: int) -> Iterator[int]:
        """`range(count)`, unless the file could not hold so many of anything."""
        if count > self._size:
            raise self._bad("be a whole file", f"{count} entries in {self._size} bytes")
        return iter(range(count))

    def _string(self, file: BinaryIO) -> str:
        (length,) = struct.unpack("<Q", file.read(8))
        text = file.read(length) if length <= self._size else b""
        if len(text) < length:
            raise self._bad("be a whole file", f"a text of {length} bytes")
        return text.decode()

    def _value(self, file: BinaryIO, kind: int | None = None) -> Any:
        if kind is None:
            (kind,) = struct.unpack("<I", file.read(4))
        if kind == _STRING:
            return self._string(file)
        if kind == _ARRAY:
            inner, count = struct.unpack("<IQ", file.read(12))
            return [self._value(file, inner) for _ in self._count(count)]
        if kind not in _SCALARS:
            raise self._bad("hold known types of values", f"type {kind}")
        form = _SCALARS[kind]
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    def _row(self, file: BinaryIO) -> tuple[str, str, tuple[int, ...], int]:
        name = self._string(file)
        (dims,) = struct.unpack("<I", file.read(4))
        if dims > 8:
            raise self._bad("hold tensors of few axes", f"{name} with {dims}")
        shape = struct.unpack(f"<{dims}Q", file.read(8 * dims))[::-1]
        kind, offset = struct.unpack("<IQ", file.read(12))
        known = _TYPES.get(kind, (f"type {kind}", 1, 0, None))
        if shape and shape[-1] % known[1]:
            raise self._bad("hold whole blocks", f"{name} with rows of {shape[-1]}")
        return name, known[0], shape, offset

    def _bad(self, requirement: str, got: str) -> ValueError:
        return ValueError(
            f"GGUF: path must {requirement}, got {self.path} ({got}); fetch or convert it again"
        )
