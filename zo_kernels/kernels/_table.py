# SPDX-License-Identifier: Apache-2.0
"""Many tensors in one launch: a table of them on their device, and which part each program has.

A row of the table is ROW numbers, int64: the address of the parameter, those of two states, its
number of elements, its stream, and `middle` (see `_updates.snap`) as the bits of an fp32 number. A
chunk is what one program has, some consecutive tiles of one tensor: its row in the upper 32 bits,
its first tile in the lower ones. All chunks have the same length, and there are about CHUNKS of
them, so that a launch neither starves a GPU nor has a table that is worth mentioning: 8 bytes a
chunk and 48 a tensor.

A table is a pure function of addresses, sizes, streams and grids: it is kept under these numbers,
and none of them can change behind it.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW = 6
CHUNKS = 4096  # about four waves of programs on the largest GPUs
LONGEST = 64  # tiles of a chunk: 64 Ki elements where a tile is 1024
KEPT = 32  # tables
ALIGNMENT = 16  # bytes of the widest access

_ROW = tl.constexpr(ROW)
_ALIGNMENT = tl.constexpr(ALIGNMENT)
_LOW = tl.constexpr(0xFFFFFFFF)


class Part(NamedTuple):
    """The tensors of a call that one kernel can take.

    Attributes:
        dtype: of the parameters.
        grid: whether they have a grid.
        aligned: whether every address is a multiple of ALIGNMENT.
        rows: int64 [tensors, ROW].
        chunks: int64 [programs].
        tiles: length of a chunk.
    """

    dtype: torch.dtype
    grid: bool
    aligned: bool
    rows: Tensor
    chunks: Tensor
    tiles: int


_T = TypeVar("_T")
_Key = tuple[object, ...]
_tables: OrderedDict[_Key, tuple[Part, ...]] = OrderedDict()
_keepers: list[list[object]] = []


def parts(
    params: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    streams: Sequence[int],
    quanta: Sequence[float],
    tile: int,
) -> tuple[Part, ...]:
    """The table of these tensors; made at the first call, and found again at the next.

    Args:
        params: contiguous, on one device; states: at most two lists of fp32 tensors of their sizes.
        quanta: the grid of each parameter, 0 for none.
        tile: elements that a program has at a time.
    """
    tensors = [params, *states]
    facts = [(p.data_ptr(), p.numel(), p.dtype) for p in params]
    others = [x.data_ptr() for state in states for x in state]
    key = (params[0].device, tile, *facts, *others, *streams, *quanta)
    found = _tables.get(key)
    if found is None:
        captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        found = tuple(_build(tensors, streams, quanta, tile, captured))
        if captured:  # its memory is written when the graph is replayed, not now
            return kept(found)
        _tables[key] = found
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return kept(found)


def kept(x: _T) -> _T:
    """x, which whoever is `keeping` keeps."""
    for keeper in _keepers:
        keeper.append(x)
    return x


@contextmanager
def keeping() -> Iterator[list[object]]:
    """Yields a list of what the launches within the block read on the device beside the tensors.

    A captured graph has to hold it as long as it is replayed: the cache of tables does not.
    """
    keeper: list[object] = []
    _keepers.append(keeper)
    try:
        yield keeper
    finally:
        _keepers.remove(keeper)


def _build(
    tensors: Sequence[Sequence[Tensor]],
    streams: Sequence[int],
    quanta: Sequence[float],
    tile: int,
    captured: bool,
) -> Iterator[Part]:
    params = tensors[0]
    members: dict[tuple[torch.dtype, bool, bool], list[int]] = {}
    for i, p in enumerate(params):
        aligned = all(x[i].data_ptr() % ALIGNMENT == 0 for x in tensors)
        if p.numel():
            grid = p.dtype == torch.float32 and quanta[i] != 0
            members.setdefault((p.dtype, grid, aligned), []).append(i)
    for (dtype, grid, aligned), indices in members.items():
        sizes = [-(-params[i].numel() // tile) for i in indices]  # in tiles
        tiles = min(LONGEST, 1 << (max(1, sum(sizes) // CHUNKS).bit_length() - 1))
        rows = []
        for i in indices:
            places = [x[i].data_ptr() for x in tensors]
            middle = struct.unpack("<i", struct.pack("<f", 1.5 * 2.0**23 * quanta[i]))[0]
            rows += [*places, *[0] * (3 - len(places)), params[i].numel(), streams[i], middle]
        chunks = [
            row << 32 | first for row, size in enumerate(sizes) for first in range(0, size, tiles)
        ]
        whole = torch.tensor(rows + chunks, dtype=torch.int64)
        if captured:  # a graph copies from memory that stays where it is
            whole = kept(whole.pin_memory())
        whole = whole.to(params[0].device, non_blocking=True)
        table = whole[: len(rows)].view(-1, ROW)
        yield Part(dtype, grid, aligned, table, whole[len(rows) :], tiles)


@triton.jit
def chunk_of(rows_ptr, chunks_ptr, tiles, TILE: tl.constexpr):
    """Of this program: its row, the elements of its tensor, their stream and grid, its first tile,
    and how many it has."""
    chunk = tl.load(chunks_ptr + tl.program_id(0))
    row_ptr = rows_ptr + (chunk >> 32) * _ROW
    n = tl.load(row_ptr + 3)
    stream = tl.load(row_ptr + 4)
    middle = tl.load(row_ptr + 5).to(tl.int32).to(tl.float32, bitcast=True)
    first = chunk & _LOW
    count = tl.minimum(tiles, (n + (TILE - 1)) // TILE - first)
    return row_ptr, n, stream, middle, first, count


@triton.jit
def pointer(row_ptr, NUMBER: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """To the parameter (0) or a state (1, 2) of a row."""
    address = tl.load(row_ptr + NUMBER).to(tl.uint64, bitcast=True)
    ptr = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, _ALIGNMENT)
    return ptr
