# SPDX-License-Identifier: Apache-2.0
"""What the zeroth-order optimizers share: groups, noise streams, and state that resumes exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

from zo_kernels.estimators import check, check_directions
from zo_kernels.optim import _streams
from zo_kernels.optim._probe import PROBES, Span
from zo_kernels.optim._scaling import Scaling

# Saved beside the state: with the weights and the groups, they decide every later step.
_SAVED = ("seed", "draw", "steps", "rejected", "clipped", "n", "estimator", "kind", "scaling")


class Shared(TypedDict, total=False):
    """The keyword arguments that every optimizer has; `_docs` documents them."""

    n: int
    estimator: str
    kind: str
    seed: int
    maximize: bool
    probe: str
    keep_perturbed: bool
    clip: float | None
    normalize: bool
    scalar_beta: float | None


class GroupedOptimizer(Optimizer):
    """Groups and state. `_step.ZOOptimizer` adds the step.

    Attributes:
        draw: the next unused direction; it only goes up, by n a step.
        steps: number of steps told, rejected ones included.
        rejected: number of steps given up because a loss was NaN or infinite.
        clipped: number of directional derivatives that `clip` bounded.
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
        n: int = 1,
        estimator: str = "two_sided",
        kind: str = "normal",
        seed: int = 0,
        maximize: bool = False,
        probe: str = "auto",
        keep_perturbed: bool = False,
        clip: float | None = None,
        normalize: bool = False,
        scalar_beta: float | None = None,
    ) -> None:
        owner = type(self).__name__
        check_directions(owner, n=n, estimator=estimator, kind=kind, seed=seed)
        check(probe in PROBES, owner, "probe", f"one of {PROBES}", probe, "choose one of them")
        fits = not keep_perturbed or (probe == "in_place" and estimator == "two_sided")
        need = "False unless probe='in_place' and estimator='two_sided'"
        check(fits, owner, "keep_perturbed", need, keep_perturbed, "the others gain nothing by it")
        self.n, self.estimator, self.kind, self.seed = n, estimator, kind, seed
        self.probe, self.keep_perturbed = probe, bool(keep_perturbed)
        self.scaling = Scaling.checked(owner, clip, normalize, scalar_beta, estimator, n)
        self.draw = self.steps = self.rejected = self.clipped = 0
        super().__init__(params, defaults | {"maximize": bool(maximize)})

    def _spans(self) -> list[Span]:
        """The parameters that require grad; asked anew each step, as trainers unfreeze some."""
        spans = [s for g in self.param_groups for s in self._by_device(g, self._trainable(g))]
        if not spans:
            total = sum(len(group["params"]) for group in self.param_groups)
            raise ValueError(
                f"{type(self).__name__}.step: params must hold a tensor that requires grad, got "
                f"0 of {total}; mark what to train with requires_grad_() (no graph is built)"
            )
        return spans

    @staticmethod
    def _trainable(group: dict[str, Any]) -> list[int]:
        return [i for i, p in enumerate(group["params"]) if p.requires_grad]

    @staticmethod
    def _by_device(group: dict[str, Any], members: Iterable[int]) -> list[Span]:
        spans: dict[torch.device, Span] = {}
        for i in members:
            p = group["params"][i]
            span = spans.setdefault(p.device, Span([], [], group))
            span.params.append(p)
            span.streams.append(group["streams"][i])
        return list(spans.values())

    def _moment(self, p: Tensor, name: str) -> Tensor:
        """The fp32 state `name` of a parameter, zero at first."""
        state: dict[str, Tensor] = self.state[p]
        if name not in state:
            with torch.inference_mode(False):  # made inside, it could not be updated outside
                state[name] = torch.zeros_like(
                    p, dtype=torch.float32, memory_format=torch.contiguous_format
                )
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
        return super().state_dict() | {"zo": self._saved()}

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
        self.scaling = Scaling(*state_dict["zo"]["scaling"])

    def _saved(self) -> dict[str, Any]:
        saved = {name: getattr(self, name) for name in _SAVED}
        return saved | {"scaling": tuple(self.scaling)}  # plain data, for weights_only loading

    def __getstate__(self) -> dict[str, Any]:
        saved = {name: getattr(self, name) for name in (*_SAVED, "probe", "keep_perturbed")}
        return super().__getstate__() | saved


def _holds(inside: Callable[[Any], bool], value: object) -> bool:
    try:
        return bool(inside(value))
    except TypeError:  # not a number at all
        return False
