# SPDX-License-Identifier: Apache-2.0
"""What both replays of a log, on torch tensors and on numpy arrays, have in common."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

from zo_kernels._zolog import Digest, Quanta, Step, Trained, Trajectory, check

T = TypeVar("T")
Buffer = bytes | memoryview


def sha256(buffers: Iterable[Buffer]) -> str:
    """In hex, of the bytes of all buffers in turn."""
    total = hashlib.sha256()
    for buffer in buffers:
        total.update(buffer)
    return total.hexdigest()


class State:
    """What the records up to a point add up to.

    Attributes:
        settings: of each group.
        quanta: the grid of each tensor, 0 or missing for none.
        trained: tensors that the next update is of.
        touched: tensors that were trained at some time.
    """

    def __init__(self, log: Trajectory) -> None:
        self.settings: list[dict[str, float]] = [dict(group) for group in log.header["groups"]]
        self.quanta: dict[int, float] = {}
        self.trained: tuple[int, ...] = ()
        self.touched: set[int] = set()
        for record in log:
            self.take(record)

    def take(self, record: object) -> None:
        """Goes one record on."""
        if isinstance(record, Trained):
            self.trained = record.tensors
            self.touched.update(record.tensors)
        elif isinstance(record, Quanta):
            self.quanta.update(record.quanta)
        elif isinstance(record, Step):
            for (group, name), value in record.settings.items():
                self.settings[group][name] = value


class Replay(ABC, Generic[T]):
    """Makes the updates of a log; a subclass knows how to make one.

    Attributes:
        tensors: position in the table -> the tensor, for those that the log trains.
        state: what holds at the record where the replay is.
    """

    def __init__(self, log: Trajectory, available: Mapping[str, T]) -> None:
        self.log, self.header, self.table = log, log.header, log.header["tensors"]
        self.state = State(log.up_to(-1))
        # A tied tensor may be there under several names, and each of them may be a copy.
        self.copies = {i: _found(self.table[i], available) for i in sorted(State(log).touched)}
        self.tensors = {i: found[0] for i, found in self.copies.items()}
        for i, found in self.copies.items():
            entry, name = self.table[i], self.table[i]["names"][0]
            for tensor in found:
                wanted, got = (entry["dtype"], tuple(entry["shape"])), self.about(tensor)
                check(got == wanted, "replay", name, f"{wanted}", got, "name the model it is of")
                _check_hash(name, entry["sha256"], sha256([self.data(tensor)]))

    def run(self) -> int:
        """Makes all updates; returns how many.

        Raises:
            ValueError: the weights are not those of the run where the log holds their hash.
        """
        for record in self.log:
            self.state.take(record)
            if isinstance(record, Quanta):
                self.snap({i: q for i, q in record.quanta.items() if q and i in self.tensors})
            elif isinstance(record, Step):
                self.update(record)
            elif isinstance(record, Digest):
                seen = sha256(self.data(self.tensors[i]) for i in sorted(self.state.touched))
                advice = "something else than the optimizer changed them, or this machine errs"
                wanted = f"those with SHA-256 {record.sha256} at draw {record.draw}"
                check(seen == record.sha256, "replay", "weights", wanted, seen, advice)
        for first, *others in self.copies.values():
            for other in others:
                self.copy(first, other)
        return self.log.updates

    @abstractmethod
    def about(self, tensor: T) -> tuple[str, tuple[int, ...]]:
        """Its dtype, as safetensors calls it, and shape."""

    @abstractmethod
    def data(self, tensor: T) -> Buffer:
        """Its bytes, in row-major order."""

    @abstractmethod
    def copy(self, source: T, target: T) -> None:
        """Makes both equal."""

    @abstractmethod
    def snap(self, quanta: dict[int, float]) -> None:
        """Moves tensors to the nearest point of a grid."""

    @abstractmethod
    def update(self, step: Step) -> None:
        """Makes one update of the tensors that are trained now."""


def _found(entry: dict[str, Any], available: Mapping[str, T]) -> list[T]:
    found = [available[name] for name in entry["names"] if name in available]
    names = " or ".join(map(repr, entry["names"]))
    got = f"{len(available)} without it"
    check(bool(found), "replay", "tensors", f"such that {names} is there", got, "name the base")
    return found


def _check_hash(name: str, wanted: str, got: str) -> None:
    need, advice = f"that with SHA-256 {wanted}", "start from the weights that the run started from"
    check(wanted == got, "replay", f"{name} of the base", need, got, advice)
