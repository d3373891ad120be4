# SPDX-License-Identifier: Apache-2.0
"""A step of an optimizer as two CUDA graphs, with one look at the losses between them.

    evaluations     put each perturbation under the model, run it, keep the loss     on the device
    coefficients    read the losses, scale, reject, log: what `tell` does            on the host
    update          restore, update and what an option adds                          on the device

A replay perturbs anew because the kernels read the draw that they count from, the coefficients and
the hyperparameters from the device: the host writes these few numbers before a replay, and waits
for nothing but the losses. So learning rate schedules, clipping, rejection, logs, resume and ranks
are those of the optimizer itself, and the weights get the bits of its ordinary step.

On the CPU the same functions, with the same numbers frozen into them, run instead of a graph: the
tests hold their bits equal to `optimizer.step`. The capture itself needs a GPU: not yet confirmed
on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zo_kernels.estimators import check
from zo_kernels.graphs import Graph, pool_of
from zo_kernels.optim._calls import Action, Base, Copy
from zo_kernels.optim._probe import InPlace
from zo_kernels.optim._round import Round
from zo_kernels.optim._step import ZOOptimizer


class GraphedStep:
    """`optimizer.step(closure)` for a closure that always runs the same kernels on the same memory.

        step = GraphedStep(optimizer, lambda: loss_of(model(pixels), target))
        for batch in data:
            pixels.copy_(batch)  # the graph reads these tensors
            loss = step()

    The first step of a kind runs as it is, which compiles what has to be compiled; the second is
    captured; from then on it is replayed. Steps are of another kind, and captured of their own,
    where other parameters require grad, their grids or eps change, or a perturbation is held.
    Whatever else changes (lr, betas, weight decay, seeded draws) changes from replay to replay.

    Args:
        optimizer: a `ZOSGD`, `ZOAdam` or `ZOSignSGD` whose trained parameters are on one device and
            contiguous, with any probe.
        closure: evaluates the model and returns the loss, a one-element tensor on that device. As
            `torch.cuda.graph` has it, it may not synchronize, copy from the host, or depend on
            numbers of Python that change; what is random in it is given in a tensor, since the
            evaluations of a step have to see the same numbers.

    Memory: that of the optimizer's step, and the closure's activations, which the graph keeps.

    Raises:
        ValueError: the parameters are on several devices.
        TypeError: the loss is not a one-element tensor on their device.
    """

    def __init__(self, optimizer: ZOOptimizer, closure: Callable[[], Tensor]) -> None:
        self.optimizer, self.closure = optimizer, closure
        self._evaluations: dict[Any, _Evaluations] = {}
        self._updates: dict[Any, _Update] = {}
        self._pool: Any = None

    @torch.no_grad()
    def __call__(self) -> float:
        """One step; returns, rejects and raises as `optimizer.step` does."""
        optimizer = self.optimizer
        try:
            optimizer.probes()
            current = optimizer._round
            assert current is not None
            devices = {p.device for span in current.spans for p in span.params}
            some = f"on {len(devices)} devices"
            need = "on one device"
            check(len(devices) == 1, "GraphedStep", "params", need, some, "use optimizer.step")
            key = _kind(current, optimizer.draw)
            if key not in self._evaluations:
                made = _Evaluations(current, optimizer.draw, devices.pop(), self._graph)
                self._evaluations[key] = made
            evaluations = self._evaluations[key]
            losses = evaluations.run(self.closure, current, optimizer.draw)
            current.apply = self._apply
            return optimizer.tell(losses)
        except BaseException:
            optimizer.cancel()
            raise

    def _apply(self, current: Round, coeffs: list[list[float]]) -> None:
        optimizer = self.optimizer
        actions = optimizer._actions(current, coeffs)
        key = tuple(action.shape(optimizer.draw) for action in actions)
        if key not in self._updates:
            device = current.spans[0].params[0].device
            self._updates[key] = _Update(actions, optimizer, device, self._graph)
        self._updates[key].run(actions, optimizer.draw)

    def _graph(self, device: torch.device, function: Callable[[], None]) -> Graph:
        if self._pool is None:
            self._pool = pool_of(device)
        return Graph(device, function, self._pool)


def _kind(current: Round, draw: int) -> tuple[Any, ...]:
    """What the evaluations of a step have frozen into them."""
    probe = current.probe
    terms = probe.held if isinstance(probe, InPlace) else []
    held = [(t[0] - draw, t[1]) if t else None for t in terms]
    spans = [
        (
            *((id(p), p.data_ptr()) for p in s.params),
            *(*s.streams, s.group["eps"], *(s.quanta or ())),
        )
        for s in current.spans
    ]
    plan = [(direction - draw, sign) for direction, sign in current.plan]
    return type(probe), *held, *spans, *plan


class _Evaluations:
    """All evaluations of a step, from the perturbations to the losses."""

    def __init__(self, current: Round, draw: int, device: torch.device, graph: Any) -> None:
        self.first, self.probe = draw, current.probe
        self.evaluations = current.evaluations
        self.held = list(self.probe.held) if isinstance(self.probe, InPlace) else []
        self.left: list[Any] = []
        self.base = Base(torch.zeros(1, dtype=torch.int64, device=device), draw)
        self.losses = torch.zeros(len(self.evaluations), dtype=torch.float64, device=device)
        self.graph: Graph = graph(device, self._evaluate)
        self.closure: Callable[[], Tensor] | None = None

    def run(self, closure: Callable[[], Tensor], current: Round, draw: int) -> list[float]:
        """The losses; the probe of `current` is then as if it had made the evaluations itself."""
        self.closure, current.probe = closure, self.probe
        self.base.tensor.fill_(draw)
        self.probe.base = self.base
        try:
            if self.graph.run():
                self._note()
            self._hold(self.left, draw)
        except BaseException:
            if self.graph.capturing:  # nothing ran
                self.probe.begin(self.held)
                self._hold(self.held, draw)
            raise
        finally:
            self.probe.base = None
        values: list[float] = self.losses.tolist()  # the one moment when the host waits
        return values

    def _note(self) -> None:
        if isinstance(self.probe, InPlace):
            self.left = list(self.probe.held)

    def _hold(self, terms: list[Any], draw: int) -> None:
        """What the weights hold, given as if this were the first step."""
        if isinstance(self.probe, InPlace):
            self.probe.held = [(t[0] - self.first + draw, t[1]) if t else None for t in terms]

    def _evaluate(self) -> None:
        assert self.closure is not None
        self.probe.begin(self.held)
        for loss, evaluation in zip(self.losses, self.evaluations, strict=True):
            with evaluation:
                result = self.closure()
            loss.copy_(_checked(result, loss.device).reshape(()))


def _checked(loss: object, device: torch.device) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.device == device:
        return loss.detach()
    got = f"{list(loss.shape)} on {loss.device}" if isinstance(loss, Tensor) else type(loss)
    raise TypeError(
        f"GraphedStep: closure must return a one-element tensor on {device}, got {got}; "
        "return the loss itself, not its item()"
    )


class _Update:
    """What ends a step: calls whose numbers the device holds."""

    def __init__(
        self, actions: list[Action], optimizer: ZOOptimizer, device: torch.device, graph: Any
    ) -> None:
        self.actions, self.seed, self.kind = actions, optimizer.seed, optimizer.kind
        self.base = Base(torch.zeros(1, dtype=torch.int64, device=device), optimizer.draw)
        size = len(_numbers(actions))
        self.numbers = torch.zeros(size, device=device)
        # The host writes here again only when it has read the losses of the next step: the copy
        # that was queued before them is over by then.
        self.staged = torch.zeros(size, pin_memory=device.type == "cuda")
        self.graph: Graph = graph(device, self._update)

    def run(self, actions: list[Action], draw: int) -> None:
        self.base.tensor.fill_(draw)
        self.staged.copy_(_numbers(actions))
        self.numbers.copy_(self.staged, non_blocking=True)
        self.graph.run()

    def _update(self) -> None:
        at = 0
        for action in self.actions:
            if isinstance(action, Copy):
                action.run(self.seed, self.kind)
                continue
            factors = self.numbers[at : at + len(action.factors)]
            at += len(action.factors)
            hyper = self.numbers[at : at + len(action.hyper)]
            at += len(action.hyper)
            action.run_at(self.base, self.seed, self.kind, (factors, hyper))


def _numbers(actions: list[Action]) -> Tensor:
    parts = [action.numbers() for action in actions if not isinstance(action, Copy)]
    return torch.cat(parts) if parts else torch.zeros(0)
