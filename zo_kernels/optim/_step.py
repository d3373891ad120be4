# SPDX-License-Identifier: Apache-2.0
"""The step of every zeroth-order optimizer: evaluate, estimate, update."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from zo_kernels._zolog import ROUNDING
from zo_kernels.estimators import check, coefficients, schedule
from zo_kernels.optim import _grid
from zo_kernels.optim._base import GroupedOptimizer
from zo_kernels.optim._calls import Action, Call
from zo_kernels.optim._probe import Span, Term, choose, make_probe
from zo_kernels.optim._round import Closure, Evaluation, Round, own


class Exchange(Protocol):
    """How ranks share a step; see `zo_kernels.distributed`."""

    def mine(self, plan: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """The (draw, sign) that this rank evaluates."""

    def gather(self, losses: list[float], count: int) -> list[float]:
        """The `count` losses of the whole step, the same numbers on every rank."""


class Log(Protocol):
    """Where the updates go; see `zo_kernels.optim.trajectory`."""

    def append(self, optimizer: ZOOptimizer, draw: int, coeffs: list[list[float]]) -> None: ...


class ZOOptimizer(GroupedOptimizer):
    """Base class; a subclass says in `_update` what an estimate does to the weights.

    A trainer either hands a closure to `step`, or evaluates the model itself:

        losses = []
        for evaluation in optimizer.probes():
            with evaluation:  # the weights are theta + sign eps z inside
                losses.append(model(inputs).loss)
        loss = optimizer.tell(losses)
    """

    log: Log | None = None
    exchange: Exchange | None = None
    _round: Round | None = None

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """One step: 2n calls of `closure` (two-sided) or n + 1 (one-sided), then one update.

        Args:
            closure: evaluates the model and returns the loss, a float or a one-element tensor. It
                runs under no_grad, and has to see the same data and draw the same random numbers
                each time. To accumulate over micro-batches, let it return their mean.

        Returns:
            The loss: at the weights themselves (one-sided), or the mean of all probes (two-sided).
            If one is NaN or infinite the step is rejected: the weights are restored, and nothing
            changes but `draw`, `steps` and `rejected`.

        Raises:
            TypeError: there is no closure, or it does not return a loss.
            ValueError: no parameter requires grad.
            Exception: whatever the closure raises, once the weights are restored.
        """
        owner = f"{type(self).__name__}.step"
        if closure is None:
            raise TypeError(
                f"{owner}: closure must be a function that returns the loss, got None; "
                "a zeroth-order step evaluates the loss itself (or use `probes` and `tell`)"
            )
        losses = []
        try:
            for evaluation in self.probes():
                with evaluation:
                    losses.append(own(closure(), owner))
            # Read back only here, when a device has all evaluations in its queue.
            return self.tell(losses)
        except BaseException:
            self.cancel()
            raise

    @torch.no_grad()
    def probes(self) -> list[Evaluation]:
        """Begins a step: the evaluations whose losses `tell` wants, in this order.

        Raises:
            RuntimeError: the step before has not been told.
            ValueError: no parameter requires grad.
        """
        if self._round is not None:
            raise RuntimeError(
                f"{type(self).__name__}.probes: the step before must have ended, got one still "
                "open; call tell(losses), or cancel() to give it up"
            )
        spans = self._spans()
        name = choose(self.probe, [p for span in spans for p in span.params])
        if name == "in_place":
            spans = self._gridded(spans)
        held = self._held(spans)
        plan = [(self.draw + j, sign) for j, sign in schedule(self.estimator, self.n)]
        plan = plan if self.exchange is None else self.exchange.mine(plan)
        probe = make_probe(name, spans, self.seed, self.kind)
        probe.begin(held)
        self._round = Round(spans, probe, plan)
        return self._round.evaluations

    @torch.no_grad()
    def tell(self, losses: Sequence[float | Tensor] | Tensor) -> float:
        """Ends the step that `probes` began, with the loss of each of its evaluations.

        Returns and rejects as `step` does. To accumulate over micro-batches, evaluate all of them
        in each evaluation and tell the means.

        Raises:
            RuntimeError: no step is open, or another rank did not answer: the step is cancelled.
            ValueError: not one loss for each evaluation.
        """
        owner = f"{type(self).__name__}.tell"
        if self._round is None:
            raise RuntimeError(f"{owner}: a step must be open, got none; call probes() first")
        count = len(self._round.evaluations)
        given = len(losses)
        check(given == count, owner, "losses", f"{count} numbers", given, "one an evaluation")
        values = [float(loss) for loss in losses]
        perturbed = any(evaluation.sign for evaluation in self._round.evaluations)
        if perturbed and all(map(math.isfinite, values)):
            self._round.probe.check(owner)
        if self.exchange is not None:
            try:
                values = self.exchange.gather(values, len(schedule(self.estimator, self.n)))
            except BaseException:  # a rank is gone: no rank makes this step
                self.cancel()
                raise
        current, self._round = self._round, None
        coeffs = self._coefficients(values)
        self.steps += 1
        accepted = all(math.isfinite(c) for row in coeffs for c in row)
        if accepted:
            (current.apply or self._apply)(current, coeffs)
        else:
            current.probe.restore()
            self.rejected += 1
        draw, self.draw = self.draw, self.draw + self.n
        if accepted and self.log is not None:  # last: a disk that is full must not undo the step
            self.log.append(self, draw, coeffs)
        return values[0] if self.estimator == "one_sided" else sum(values) / len(values)

    @torch.no_grad()
    def cancel(self) -> None:
        """Gives the open step up, if there is one: the weights are theta, `draw` is unchanged."""
        current, self._round = self._round, None
        if current is not None:
            current.probe.restore()

    @torch.no_grad()
    def eval(self) -> None:
        """Takes a perturbation that `keep_perturbed` left in the weights out of them.

        Call it before you evaluate or save the model; the next step puts it back. Without
        `keep_perturbed` there is nothing to take out.
        """
        self.cancel()
        for group in self.param_groups:
            held = group.pop("held", None)
            if held:
                draw, scale, members = held
                for span in self._on_grid(self._by_device(group, members)):
                    span.add([(draw, -scale)], self.seed, self.kind)

    def _held(self, spans: list[Span]) -> list[Term | None]:
        """What `keep_perturbed` left in each span; taken out at once if the set has changed."""
        now = {id(g): self._trainable(g) for g in self.param_groups}
        if any("held" in g and g["held"][2] != now[id(g)] for g in self.param_groups):
            self.eval()
        if not any("held" in g for g in self.param_groups):
            return []
        left = {id(g): tuple(g.pop("held")[:2]) for g in self.param_groups if "held" in g}
        return [left.get(id(span.group)) for span in spans]

    def _gridded(self, spans: list[Span]) -> list[Span]:
        """The spans on their grids; a new parameter, or one that outgrew its grid, is snapped."""
        look = _grid.look_at(self.steps)
        if look:
            self.eval()
        for span in spans:
            eps, moved = span.group["eps"], Span([], [], span.group)
            for p, stream in zip(span.params, span.streams, strict=True):
                q = self.state[p].get("quantum")
                if p.dtype == torch.float32 and (q is None or (look and _grid.outgrown(p, q, eps))):
                    self.state[p]["quantum"] = _grid.quantum(_grid.largest(p), eps)
                    moved.params.append(p)
                    moved.streams.append(stream)
            for new in self._on_grid([moved] if moved.params else []):
                new.snap()
        return self._on_grid(spans)

    def _on_grid(self, spans: list[Span]) -> list[Span]:
        return [
            s._replace(quanta=[self.state[p].get("quantum", 0.0) for p in s.params]) for s in spans
        ]

    def _coefficients(self, losses: Sequence[float]) -> list[list[float]]:
        """c_j of each group, from the losses of the whole step."""
        rows = []
        perturbed = losses[1:] if self.estimator == "one_sided" else losses
        for group in self.param_groups:
            row = coefficients(losses, estimator=self.estimator, eps=group["eps"])
            if all(map(math.isfinite, row)):
                row, clipped = self.scaling.apply(row, perturbed, group)
                self.clipped += clipped
            rows.append([-c for c in row] if group["maximize"] else row)
        return rows

    def _apply(self, current: Round, coeffs: list[list[float]]) -> None:
        for action in self._actions(current, coeffs):
            action.run(self.seed, self.kind)

    def _actions(self, current: Round, coeffs: list[list[float]]) -> list[Action]:
        """Restore, update and, on request, the next perturbation: one pass where that is exact."""
        draws = range(self.draw, self.draw + self.n)
        rows = {id(g): row for g, row in zip(self.param_groups, coeffs, strict=True)}
        round_draw = ROUNDING + self.draw
        actions: list[Action] = []
        for number, span in enumerate(current.spans):
            row = rows[id(span.group)]
            back, out = current.probe.release(number)
            actions += back
            held = (self.draw + self.n, span.group["eps"]) if self.keep_perturbed else None
            into = [held] if held else []
            scales = self._as_noise(span.group, row)
            if scales is None:
                actions += span.adding(out)
                actions += self._update(span, draws, row, round_draw)
                actions += span.adding(into)
            else:
                terms = [*out, *zip(draws, scales, strict=True), *into]
                actions += span.adding(terms, round_draw)
            if held:
                span.group["held"] = [*held, self._trainable(span.group)]
        return actions

    def _as_noise(self, group: dict[str, Any], coeffs: Sequence[float]) -> list[float] | None:
        """Scales s_j if the update is theta + sum_j s_j z_j and nothing else, otherwise None."""
        return None

    @abstractmethod
    def _update(
        self, span: Span, draws: Sequence[int], coeffs: Sequence[float], round_draw: int
    ) -> list[Call]:
        """What updates the parameters of one group with g_hat = sum_j coeffs[j] z(draws[j])."""
