# SPDX-License-Identifier: Apache-2.0
"""The log of a run as its checkpoint: base weights and kilobytes give the trained weights again.

    optimizer = ZOSGD(model.named_parameters(), lr=1e-3)
    with TrajectoryWriter("run.zolog", optimizer, model) as optimizer.log:
        for batch in data:
            optimizer.step(lambda: model(**batch).loss)

    replay(base_model, "run.zolog")  # the bits of `model`, on any machine and backend

An update is a pure function of weights, state, noise and a few numbers, and the noise of a counter:
the log holds the numbers, 27 bytes a step with one direction (`zo_kernels._zolog` has the format).
Replaying needs no data and no forward pass. `python -m zo_kernels.replay` does it on safetensors
files, with numpy alone if need be.

The log follows what the optimizer does: schedulers, rejected steps, parameters that freeze or thaw,
grids of the `in_place` probe. It does not see weights that are changed by anything else. Between
ranks that share steps, one of them writes the log.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from zo_kernels import _zolog
from zo_kernels._files import atomic_write
from zo_kernels._replay import State, sha256
from zo_kernels._zolog import (
    SETTINGS,
    Digest,
    Quanta,
    Record,
    Step,
    Trained,
    Trajectory,
    check,
    read,
)
from zo_kernels.optim._probe import choose
from zo_kernels.optim._remake import replay
from zo_kernels.optim._step import ZOOptimizer
from zo_kernels.optim._table import (
    Named,
    bytes_of,
    header_of,
    names_of,
    params_of,
    settings_of,
)

__all__ = [
    "Digest",
    "Quanta",
    "Step",
    "Trained",
    "Trajectory",
    "TrajectoryWriter",
    "read",
    "replay",
]


class TrajectoryWriter:
    """Writes the log of an optimizer: make it `optimizer.log`, and close it after the last step.

    Each update is appended by one write, so that a crash loses at most the last one. A file that is
    there is continued: load the optimizer's state and the weights first. Updates past the
    optimizer's `draw` are then cut off, for they will be made again.

    Args:
        path: the log; by convention it ends in .zolog.
        optimizer: one of `zo_kernels.optim`. A new log wants one without state, as it starts from
            the weights alone.
        params: the model, or named parameters, that give the tensors their names; None takes those
            that the optimizer was given.
        fsync_every: steps between two fsyncs; 0 leaves them to the system: a crash of the process
            loses nothing more, one of the machine may.

    Raises:
        ValueError: a parameter without a name, an optimizer that a log cannot describe, or a file
            that is not the log of this run.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        optimizer: ZOOptimizer,
        params: Named | None = None,
        *,
        fsync_every: int = 0,
    ) -> None:
        owner = type(self).__name__
        kind, known = type(optimizer).__name__, tuple(SETTINGS)
        check(kind in known, owner, "optimizer", f"one of {known}", kind, "log one of them")
        self.path, self.optimizer, self.fsync_every = Path(path), optimizer, fsync_every
        self._params = params_of(optimizer)
        optimizer.eval()  # the weights are theta
        header = header_of(optimizer, names_of(optimizer, params))
        self._check_probe()
        log = self._continued(header) if self.path.exists() else self._begun(header)
        self._header, self._crc, self._state = log.header, log.crc, State(log)
        self._end, self._updates = log.end, log.header["updates"] + log.updates
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._file.truncate(self._end)

    def append(self, optimizer: ZOOptimizer, draw: int, coeffs: list[list[float]]) -> None:
        """Logs the update that was just made; the optimizer calls it.

        Raises:
            ValueError: the log is closed, or has missed an update.
            OSError: the record could not be written; the log ends before it.
        """
        owner = f"{type(self).__name__}.append"
        ours = optimizer is self.optimizer and not self._file.closed
        check(ours, owner, "log", "open, and of this optimizer", self.path, "open it again")
        same = [id(p) for p in params_of(optimizer)] == [id(p) for p in self._params]
        count = len(self._params)
        check(same, owner, "params", f"the {count} of the start", "others", "begin a new log")
        made = optimizer.steps - optimizer.rejected
        has = f"a log of the {made - 1} updates before this one"
        advice = "set `optimizer.log` before the first step, and open it after load_state_dict"
        check(self._updates == made - 1, owner, "log", has, self._updates, advice)
        now = [settings_of(group, self._header["optimizer"]) for group in optimizer.param_groups]
        settings = {
            (number, name): value
            for number, (old, new) in enumerate(zip(self._state.settings, now, strict=True))
            for name, value in new.items()
            if value != old[name]
        }
        self._write([*self._changes(), Step(draw, coeffs, settings)])
        self._updates += 1
        if self.fsync_every and self._updates % self.fsync_every == 0:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the log with the hash of the trained weights, which a replay then has to meet.

        Calls `optimizer.eval()`: the weights are theta.
        """
        if self._file.closed:
            return
        self.optimizer.eval()
        changes = self._changes()
        for record in changes:
            self._state.take(record)
        digest = sha256(bytes_of(self._params[i]) for i in sorted(self._state.touched))
        self._write([*changes, Digest(self.optimizer.draw, digest)])
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:  # the weights may be anything
            self._file.close()

    def _begun(self, header: dict[str, Any]) -> Trajectory:
        state = self.optimizer.state.values()
        fresh = all(set(held) <= {"quantum"} for held in state)
        owner, advice = type(self).__name__, "continue the log that the run began with"
        check(fresh, owner, "optimizer", "without state for a new log", "some", advice)
        for entry, p in zip(header["tensors"], self._params, strict=True):
            entry["sha256"] = sha256([bytes_of(p)])
        with atomic_write(self.path) as temporary:
            temporary.write_bytes(_zolog.pack_header(header))
        return read(self.path)

    def _continued(self, header: dict[str, Any]) -> Trajectory:
        owner, log = type(self).__name__, read(self.path)
        for name in ("optimizer", "seed", "kind", "tensors"):
            there, here = log.header[name], header[name]
            if name == "tensors":
                there = [{k: v for k, v in entry.items() if k != "sha256"} for entry in there]
            advice = "choose another path for another run"
            got = "another" if name == "tensors" else repr(here)
            wanted = "the table of the log" if name == "tensors" else f"{there!r}, as in the log"
            check(there == here, owner, name, wanted, got, advice)
        log = log.up_to(self.optimizer.draw)
        made = self.optimizer.steps - self.optimizer.rejected
        held = log.header["updates"] + log.updates
        wanted = f"a log of the {made} updates that the optimizer has made"
        advice = "resume from the checkpoint that belongs to it"
        check(held == made, owner, "path", wanted, f"one of {held} up to its draw", advice)
        if not log.updates:
            hashes = [entry["sha256"] for entry in log.header["tensors"]]
            same = hashes == [sha256([bytes_of(p)]) for p in self._params]
            wanted = "those that the log starts from"
            check(same, owner, "weights", wanted, "others", "choose another path for another run")
        return log

    def _check_probe(self) -> tuple[list[int], str]:
        """The tensors that are trained now, and the probe that is under them."""
        trained = [i for i, p in enumerate(self._params) if p.requires_grad]
        probe = choose(self.optimizer.probe, [self._params[i] for i in trained])
        low = {str(p.dtype) for p in self._params if p.requires_grad} - {"torch.float32"}
        exact = probe != "in_place" or not low
        need, advice = "exact, for a log of bf16 or fp16", "use probe='virtual' or 'snapshot'"
        check(exact, type(self).__name__, "probe", need, probe, advice)
        return trained, probe

    def _changes(self) -> list[Record]:
        """What is trained, and on which grids, if that is not what the log says."""
        trained, probe = self._check_probe()
        records: list[Record] = []
        if tuple(trained) != self._state.trained:
            records.append(Trained(tuple(trained)))
        states = [self.optimizer.state.get(self._params[i], {}) for i in trained]
        now = [s.get("quantum", 0.0) if probe == "in_place" else 0.0 for s in states]
        old = self._state.quanta
        moved = {i: q for i, q in zip(trained, now, strict=True) if q != old.get(i, 0.0)}
        return [*records, Quanta(moved)] if moved else records

    def _write(self, records: Sequence[Record]) -> None:
        data = b"".join(_zolog.pack(record, self._header, self._crc) for record in records)
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(f"{self.path}: {written} of {len(data)} bytes could be written")
        except BaseException:
            self._file.truncate(self._end)  # or the next record would follow half of this one
            raise
        self._end += len(data)
        for record in records:
            self._state.take(record)
