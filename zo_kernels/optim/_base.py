# SPDX-License-Identifier: Apache-2.0
"""What the zeroth-order optimizers share: the step, rejection, streams and exact resume."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from zo_kernels.estimators import check, check_directions, coefficients, schedule
from zo_kernels.optim import _streams
from zo_kernels.optim._probe import PROBES, Closure, Span, evaluate, make_probe

# Saved beside the state: with the weights and the groups, they decide every later step.
_SAVED = ("seed", "draw", "rejected", "n", "estimator", "kind")


class ZOOptimizer(Optimizer):
    """Base class; a subclass says in `_update` what an estimate does to the weights.

    Attributes:
        draw: the next unused direction; it only goes up, by n a step.
        rejected: number of steps given up because a loss was NaN or infinite.
    """

    # hyperparameter of a group -> (is it in its bound?, the bound, what to do)
    bounds: ClassVar[dict[str, tuple[Callable[[Any], bool], str, str]]] = {
        "lr": (lambda v: 0 <= v < math.inf, "finite and >= 0", "use `maximize` to climb"),
        "eps": (lambda v: 0 < v < math.inf, "finite and > 0", "start with 1e-3"),
        "weight_decay": (lambda v: 0 <= v < math.inf, "finite and >= 0", "0 is no decay"),
    }

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        n: int,
        estimator: str,
        kind: str,
        seed: int,
        probe: str,
    ) -> None:
        owner = type(self).__name__
        check_directions(owner, n=n, estimator=estimator, kind=kind, seed=seed)
        check(probe in PROBES, owner, "probe", f"one of {PROBES}", probe, "choose one of them")
        self.n, self.estimator, self.kind, self.seed = n, estimator, kind, seed
        self.probe = probe
        self.draw = 0
        self.rejected = 0
        super().__init__(params, defaults)

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
            changes but `draw` and `rejected`.

        Raises:
            TypeError: there is no closure, or it does not return a loss.
            ValueError: no parameter requires grad.
            Exception: whatever the closure raises, once the weights are restored.
        """
        owner = f"{type(self).__name__}.step"
        if closure is None:
            raise TypeError(
                f"{owner}: closure must be a function that returns the loss, got None; "
                "a zeroth-order step evaluates the loss itself"
            )
        spans = self._spans()
        probe = make_probe(self.probe, spans, self.seed, self.kind)
        plan = [(self.draw + j, sign) for j, sign in schedule(self.estimator, self.n)]
        losses = evaluate(closure, probe, plan, owner)
        draws = [self.draw + j for j in range(self.n)]
        self.draw += self.n
        coeffs = [self._coefficients(losses, span) for span in spans]
        if all(math.isfinite(c) for row in coeffs for c in row):
            for span, row in zip(spans, coeffs, strict=True):
                self._update(span, draws, row)
        else:
            self.rejected += 1
        return losses[0] if self.estimator == "one_sided" else sum(losses) / len(losses)

    @abstractmethod
    def _update(self, span: Span, draws: Sequence[int], coeffs: Sequence[float]) -> None:
        """Updates the parameters of one group with g_hat = sum_j coeffs[j] z(draws[j])."""

    def _spans(self) -> list[Span]:
        """The parameters that require grad; asked anew each step, as trainers unfreeze some."""
        spans: list[Span] = []
        for group in self.param_groups:
            by_device: dict[torch.device, Span] = {}
            for p, stream in zip(group["params"], group["streams"], strict=True):
                if p.requires_grad:
                    span = by_device.setdefault(p.device, Span([], [], group))
                    span.params.append(p)
                    span.streams.append(stream)
            spans += by_device.values()
        if not spans:
            total = sum(len(group["params"]) for group in self.param_groups)
            raise ValueError(
                f"{type(self).__name__}.step: params must hold a tensor that requires grad, got "
                f"0 of {total}; mark what to train with requires_grad_() (no graph is built)"
            )
        return spans

    def _coefficients(self, losses: Sequence[float], span: Span) -> list[float]:
        coeffs = coefficients(losses, estimator=self.estimator, eps=span.group["eps"])
        return [-c for c in coeffs] if span.group["maximize"] else coeffs

    def _moment(self, p: Tensor, name: str) -> Tensor:
        """The fp32 state `name` of a parameter, zero at first."""
        state: dict[str, Tensor] = self.state[p]
        if name not in state:
            with torch.inference_mode(False):  # made inside, it could not be updated outside
                state[name] = torch.zeros_like(p, dtype=torch.float32)
        return state[name]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which may have hyperparameters and noise streams of its own.

        A named parameter takes its stream from its name, so that its noise does not depend on the
        order of the parameters; an unnamed one takes the next free number; a list `streams` in the
        group sets them. A parameter that is listed twice (tied weights) counts once.

        Raises:
            ValueError: a hyperparameter out of its bound, or a stream that is not new.
        """
        owner = type(self).__name__
        for name, (inside, requirement, advice) in self.bounds.items():
            value = param_group.get(name, self.defaults[name])
            check(_holds(inside, value), owner, name, requirement, value, advice)
        group = dict(param_group)
        params = group["params"]
        if not isinstance(params, set):  # torch refuses sets, and says why
            params = _streams.unique([params] if isinstance(params, Tensor) else params)
            taken = {stream for g in self.param_groups for stream in g["streams"]}
            group["params"] = params
            group["streams"] = _streams.assign(params, group.get("streams"), taken, owner)
        super().add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """That of `torch.optim`, and under "zo" the seed, the draw counter and the estimator."""
        return super().state_dict() | {"zo": {name: getattr(self, name) for name in _SAVED}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken: the later steps have the same bits.

        Raises:
            ValueError: the state of another kind of optimizer, or of other parameters.
        """
        owner, whole = f"{type(self).__name__}.load_state_dict", "a dict with a complete 'zo' part"
        complete = set(_SAVED) <= set(state_dict.get("zo", ()))
        check(complete, owner, "state_dict", whole, [*state_dict], "load one saved by this class")
        super().load_state_dict(state_dict)
        # torch has cast the state to its parameter's dtype; moments are fp32 whatever that is.
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)
        for name in _SAVED:
            setattr(self, name, state_dict["zo"][name])

    def __getstate__(self) -> dict[str, Any]:
        saved = {name: getattr(self, name) for name in (*_SAVED, "probe")}
        return super().__getstate__() | saved


def _holds(inside: Callable[[Any], bool], value: object) -> bool:
    try:
        return bool(inside(value))
    except TypeError:  # not a number at all
        return False
