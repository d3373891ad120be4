# SPDX-License-Identifier: Apache-2.0
"""The updates of a trajectory, made again on torch tensors by the optimizer's own code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zo_kernels._replay import Replay
from zo_kernels._zolog import Step, Trajectory, read
from zo_kernels.optim._probe import Span
from zo_kernels.optim._round import Round
from zo_kernels.optim._table import Named, bytes_of, dtype_of, group_of, pairs_of
from zo_kernels.optim._virtual import Virtual
from zo_kernels.optim.zoadam import ZOAdam
from zo_kernels.optim.zosgd import ZOSGD
from zo_kernels.optim.zosignsgd import ZOSignSGD

_CLASSES: dict[str, Any] = {c.__name__: c for c in (ZOSGD, ZOAdam, ZOSignSGD)}


@torch.no_grad()
def replay(
    params: Named, path: str | os.PathLike[str] | Trajectory, *, until: int | None = None
) -> int:
    """Makes the updates of a log again, in place: `params` get the bits that the run had.

    Args:
        params: the model, its state dict, or named tensors, with the weights that the run started
            from; on any device.
        path: the log, or what `read` returned.
        until: stop where the optimizer's counter `draw` was this; None is the end.

    Returns:
        The number of updates.

    Raises:
        ValueError: not a log, or of another base: `params` are untouched. Or the result is not that
            of the run: they are not.
    """
    log = path if isinstance(path, Trajectory) else read(path)
    return _TorchReplay(log.up_to(until), dict(pairs_of(params))).run()


class _TorchReplay(Replay[Tensor]):
    """By the optimizer's own update, under the probe that never writes."""

    def __init__(self, log: Trajectory, available: Mapping[str, Tensor]) -> None:
        super().__init__(log, {name: p.detach() for name, p in available.items()})
        header, groups = self.header, [group_of(settings) for settings in self.state.settings]
        for group in groups:
            group |= {"params": [], "streams": []}
        self.places: dict[int, tuple[int, int]] = {}  # tensor -> its group, and where there
        for i, p in self.tensors.items():
            entry = self.table[i]
            group = groups[entry["group"]]
            self.places[i] = entry["group"], len(group["params"])
            group["params"].append(p)
            group["streams"].append(entry["stream"])
        kind = _CLASSES[header["optimizer"]]
        self.optimizer = kind(groups, seed=header["seed"], kind=header["kind"])

    def about(self, tensor: Tensor) -> tuple[str, tuple[int, ...]]:
        return dtype_of(tensor), tuple(tensor.shape)

    def data(self, tensor: Tensor) -> memoryview | bytes:
        return bytes_of(tensor)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def snap(self, quanta: dict[int, float]) -> None:
        for i, quantum in quanta.items():
            p, stream = self.tensors[i], self.table[i]["stream"]
            Span([p], [stream], {}, [quantum]).snap()

    def update(self, step: Step) -> None:
        optimizer = self.optimizer
        optimizer.draw, optimizer.n = step.draw, len(step.coeffs[0])
        spans = []
        for number, group in enumerate(optimizer.param_groups):
            group.update(group_of(self.state.settings[number]))
            places = [self.places[i] for i in self.state.trained]
            spans += optimizer._by_device(group, [at for g, at in places if g == number])
        for i in self.state.trained:
            optimizer.state[self.tensors[i]]["quantum"] = self.state.quanta.get(i, 0.0)
        probe = Virtual(spans, optimizer.seed, optimizer.kind)
        optimizer._apply(Round(optimizer._on_grid(spans), probe, []), step.coeffs)
