# SPDX-License-Identifier: Apache-2.0
"""`python -m zo_kernels.replay base.safetensors run.zolog out.safetensors`: the trained weights.

Makes the updates of a log (see `zo_kernels.optim.trajectory`) again on a safetensors file. The bits
are those of the run. It uses torch where that is installed, as it is faster, and numpy elsewhere:
this module imports neither safetensors nor torch by itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from zo_kernels._files import atomic_write
from zo_kernels._replay import Replay
from zo_kernels._zolog import ROUNDING, Step, Trajectory, check, read
from zo_kernels.updates_numpy import add_noise_numpy, zo_adam_numpy, zo_sgd_numpy

ENGINES = ("auto", "torch", "numpy")
# How an array holds a trained tensor; numpy has no bf16 of its own.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Path_ = str | PathLike[str]


def replay_file(
    base: Path_, log: Path_, out: Path_, *, until: int | None = None, engine: str = "auto"
) -> int:
    """Writes `base` with the updates of `log` made to it; everything else in it is copied.

    Args:
        base: safetensors file with the weights that the run started from, under the names that they
            have in the log.
        log: what a `TrajectoryWriter` wrote.
        out: appears whole or not at all; may be `base`.
        until: stop where the optimizer's counter `draw` was this; None is the end.
        engine: "numpy", which needs nothing else; "torch"; or "auto", torch if it is installed.

    Returns:
        The number of updates.

    Raises:
        ValueError: a file that is damaged, of another run, or does not give the result of the run.
        OSError: a file cannot be read or written.
    """
    check(engine in ENGINES, "replay", "engine", f"one of {ENGINES}", engine, "choose one of them")
    trajectory, places = read(log).up_to(until), _table(Path(base))
    with atomic_write(Path(out)) as temporary:
        shutil.copyfile(base, temporary)
        whole = np.memmap(temporary, np.uint8, "r+")
        arrays = {
            name: whole[begin:end].view(DTYPES[dtype]).reshape(shape)
            for name, (dtype, shape, begin, end) in places.items()
            if dtype in DTYPES
        }
        # A header of odd length puts tensors where torch cannot read them.
        copies = {name: array.copy() for name, array in arrays.items() if not array.flags.aligned}
        updates = _run(trajectory, arrays | copies, engine)
        for name, array in copies.items():
            arrays[name][...] = array
        whole.flush()
    return updates


def replay_numpy(
    log: Trajectory, arrays: Mapping[str, np.ndarray], *, until: int | None = None
) -> int:
    """`zo_kernels.optim.trajectory.replay` on contiguous arrays; bf16 is given as uint16."""
    return NumpyReplay(log.up_to(until), arrays).run()


def _run(log: Trajectory, arrays: Mapping[str, np.ndarray], engine: str) -> int:
    if engine == "numpy" or (engine == "auto" and find_spec("torch") is None):
        return replay_numpy(log, arrays)
    import torch

    from zo_kernels.optim.trajectory import replay

    tensors = {}
    for name, array in arrays.items():
        bf16 = array.dtype == DTYPES["BF16"]
        tensor = torch.from_numpy(array.view(np.int16) if bf16 else array)
        tensors[name] = tensor.view(torch.bfloat16) if bf16 else tensor
    return replay(tensors, log)


class NumpyReplay(Replay[np.ndarray]):
    """By the twins of the ops in `zo_kernels.updates_numpy`."""

    def __init__(self, log: Trajectory, available: Mapping[str, np.ndarray]) -> None:
        super().__init__(log, available)
        self.moments: dict[tuple[int, str], np.ndarray] = {}
        self.steps = dict.fromkeys(self.tensors, 0)

    def about(self, tensor: np.ndarray) -> tuple[str, tuple[int, ...]]:
        return _NAMES.get(tensor.dtype, str(tensor.dtype)), tensor.shape

    def data(self, tensor: np.ndarray) -> bytes | memoryview:
        return tensor.reshape(-1).view(np.uint8).data if tensor.size else b""

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        target[...] = source

    def snap(self, quanta: dict[int, float]) -> None:
        for i, quantum in quanta.items():
            stream = self.table[i]["stream"]
            add_noise_numpy(self.tensors[i], stream, 0, [], [], quantum=quantum)

    def update(self, step: Step) -> None:
        for i in self.state.trained:
            entry = self.table[i]
            group = self.state.settings[entry["group"]]
            coeffs = step.coeffs[entry["group"]]
            self._update(i, range(step.draw, step.draw + len(coeffs)), coeffs, **group)

    def _update(
        self,
        i: int,
        draws: Sequence[int],
        coeffs: Sequence[float],
        *,
        lr: float,
        weight_decay: float,
        **other: float,
    ) -> None:
        """What the `_update` of the optimizer does to one tensor."""
        p, stream, seed = self.tensors[i], self.table[i]["stream"], self.header["seed"]
        how: dict[str, Any] = {
            "kind": self.header["kind"],
            "quantum": self.state.quanta.get(i, 0.0),
            "round_draw": ROUNDING + draws[0],
        }
        optimizer, momentum = self.header["optimizer"], other.get("momentum", 0.0)
        if optimizer == "ZOSGD" and not momentum:
            decay, scales = 1.0 - lr * weight_decay, [-lr * c for c in coeffs]
            add_noise_numpy(p, stream, seed, draws, scales, decay, **how)
            return
        how |= {"lr": lr, "weight_decay": weight_decay}
        if optimizer == "ZOAdam":
            self.steps[i] += 1
            how |= {"step": self.steps[i], "betas": (other["beta1"], other["beta2"])}
            how["adam_eps"] = other["adam_eps"]
            moments = self._moment(i, "exp_avg"), self._moment(i, "exp_avg_sq")
            zo_adam_numpy(p, *moments, stream, seed, draws, coeffs, **how)
        else:
            buffer = self._moment(i, "momentum_buffer") if momentum else None
            how |= {"momentum": momentum, "sign": optimizer == "ZOSignSGD"}
            zo_sgd_numpy(p, buffer, stream, seed, draws, coeffs, **how)

    def _moment(self, i: int, name: str) -> np.ndarray:
        if (i, name) not in self.moments:
            self.moments[i, name] = np.zeros(self.tensors[i].shape, np.float32)
        return self.moments[i, name]


def _table(path: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Name -> dtype, shape, and range of bytes in the file, of every tensor in a safetensors file.

    Raises:
        ValueError: it is not one.
    """
    try:
        return dict(_rows(path))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"replay: base must be a safetensors file, got {path}: {error}; name the model that "
            "the run started from"
        ) from error


def _rows(path: Path) -> Iterator[tuple[str, tuple[str, list[int], int, int]]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if not 8 + length <= begin <= end <= size:
            raise ValueError(f"{name} lies outside of the file")
        dtype, shape = entry["dtype"], entry["shape"]
        bytes_ = DTYPES[dtype].itemsize * int(np.prod(shape)) if dtype in DTYPES else end - begin
        if bytes_ != end - begin:
            raise ValueError(f"{name} has {end - begin} bytes, not {bytes_}")
        yield name, (dtype, shape, begin, end)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for an error of the user."""
    parser = argparse.ArgumentParser(
        prog="python -m zo_kernels.replay",
        description="Make the updates of a trajectory log on a safetensors file.",
    )
    parser.add_argument("base", help="the weights that the run started from")
    parser.add_argument("log", help="the log of the run")
    parser.add_argument("out", help="the file to write")
    parser.add_argument("--until", type=int, metavar="DRAW", help="stop at this draw")
    parser.add_argument("--engine", choices=ENGINES, default="auto")
    given = parser.parse_args(argv)
    try:
        updates = replay_file(
            given.base, given.log, given.out, until=given.until, engine=given.engine
        )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{updates} updates, {given.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
