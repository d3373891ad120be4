# SPDX-License-Identifier: Apache-2.0
"""Tiles by timing, where ZO_AUTOTUNE=1 asks for it; else each kernel's own function of the shape.

The first call of a kernel at a shape tries the values of one field after another, keeps the fastest
tiles, and notes them in a file of the GPU in the folder ZO_CACHE: {"machine": ..., "tiles": {key:
[...]}}. A key holds the op, the shape, with rows up to the next power of two, and the formats; the
machine is the GPU's name and capability and Triton's version. What is no such file, or another
machine's, is ignored with a warning and replaced. Nothing is timed while a CUDA graph is captured.

Other tiles sum floats in another order: their last bits then depend on what was found fastest.
Integers are the same to the bit. Timing flushes the caches with a buffer of 256 MB.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.runtime.errors import TritonError

from zo_kernels import _env
from zo_kernels._files import atomic_write

ROUNDS = 2  # over all fields

_log = logging.getLogger("zo_kernels")
T = TypeVar("T", bound=tuple[int, ...])  # a NamedTuple
Options = Mapping[str, Sequence[int]]  # field: its values


def bucket(rows: int) -> int:
    """What stands for `rows` in a key."""
    return triton.next_power_of_2(rows)


class Tuner:
    """The tiles of one machine.

    Args:
        file: where they are kept.
        machine: what a file must name, or it is ignored.
        timer: call -> its duration, in any unit.
    """

    def __init__(
        self, file: Path, machine: Mapping[str, str], timer: Callable[[Callable[[], object]], float]
    ) -> None:
        self._file, self._machine, self._timer = file, dict(machine), timer
        self._tiles = self._read()

    def known(self, key: str, default: T, options: Options) -> T | None:
        """The tiles of `key`, if they are some of the options."""
        kept = self._tiles.get(key)
        if kept is None:
            return None
        fields = type(default)._fields  # type: ignore[attr-defined]
        if len(kept) == len(fields) and all(
            value == at_first or value in options.get(name, ())
            for name, value, at_first in zip(fields, kept, default, strict=True)
        ):
            made: T = type(default)._make(kept)  # type: ignore[attr-defined]
            return made
        _log.warning(f"{self._file}: tiles of {key!r} are none that it can have, {kept}; ignored")
        return None

    def choose(self, key: str, default: T, options: Options, run: Callable[[T], object]) -> T:
        """The tiles of `key`: those that are known, else the fastest, from `default` on."""
        known = self.known(key, default, options)
        if known is None:
            known = self._fastest(default, options, run)
            self._tiles[key] = known
            self._write()
        return known

    def _fastest(self, default: T, options: Options, run: Callable[[T], object]) -> T:
        best, times = default, {default: self._time(default, run)}
        for _ in range(ROUNDS):
            before = best
            for field, values in options.items():
                for value in values:
                    tiles = best._replace(**{field: value})  # type: ignore[attr-defined]
                    if tiles not in times:
                        times[tiles] = self._time(tiles, run)
                best = min(times, key=times.__getitem__)
            if best == before:
                break
        return best

    def _time(self, tiles: T, run: Callable[[T], object]) -> float:
        try:
            return self._timer(lambda: run(tiles))
        except TritonError:  # beyond the registers or the shared memory of this GPU
            return float("inf")

    def _read(self) -> dict[str, Sequence[int]]:
        try:
            content = json.loads(self._file.read_text())
            machine, tiles = content["machine"], content["tiles"]
            if not all(type(x) is int for kept in tiles.values() for x in kept):
                raise TypeError("tiles must be integers")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            _log.warning(f"{self._file}: no file of tiles ({error}); ignored")
            return {}
        if machine != self._machine:
            _log.warning(f"{self._file}: tiles of another machine, {machine}; ignored")
            return {}
        return dict(tiles)

    def _write(self) -> None:
        """Beside what another process may have noted since."""
        others = self._read() if self._file.exists() else {}
        self._tiles = {**others, **self._tiles}
        text = json.dumps({"machine": self._machine, "tiles": self._tiles}, indent=1) + "\n"
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._file) as temporary:
                temporary.write_text(text)
        except OSError as error:
            _log.warning(f"{self._file}: tiles are not kept: {error}")


def tuned(
    op: str,
    formats: Mapping[str, object],
    default: T,
    options: Callable[[], Options],
    run: Callable[[T], object],
    device: torch.device,
) -> T:
    """`default`, or where ZO_AUTOTUNE=1 the tiles that were found fastest on this GPU.

    Args:
        formats: all that the choice may depend on.
        options: the values that a field of `default` may have.
        run: launches the kernel with such tiles; again and again where they are being chosen.
    """
    if not _env.autotune():
        return default
    key = " ".join((op, *(f"{name}={value}" for name, value in formats.items())))
    tuner = _tuner(device.index if device.index is not None else torch.cuda.current_device())
    if torch.cuda.is_current_stream_capturing():
        return tuner.known(key, default, options()) or default
    return tuner.choose(key, default, options(), run)


@cache
def _tuner(index: int) -> Tuner:
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    machine = {"gpu": name, "capability": "{}.{}".format(*capability), "triton": triton.__version__}
    words = "-".join(machine.values())
    slug = "".join(c if c.isalnum() or c in ".-" else "-" for c in words)
    return Tuner(_env.cache() / f"tiles-{slug}.json", machine, _median)


def _median(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    milliseconds: Any = do_bench(call, warmup=5, rep=20, return_mode="median")
    return float(milliseconds)
