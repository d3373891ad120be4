# SPDX-License-Identifier: Apache-2.0
"""What a step does to the weights, as data: run at once, or again and again by a captured graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_kernels._registry import OPS
from zo_kernels.ops import _updates, add_noise_, zo_adam_, zo_sgd_


@dataclass(frozen=True, eq=False)
class Base:
    """The draw that a graph counts from: a number on the device, changed before each replay.

    Attributes:
        tensor: int64 [1], on the device.
        first: the draw that it stands for in the calls that are captured.
    """

    tensor: Tensor
    first: int
    _constants: dict[Any, Tensor] = field(default_factory=dict)

    def constant(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """On the device; made before the capture, which can't copy from the host."""
        key = (dtype, *values)
        if key not in self._constants:
            made = torch.tensor(values, dtype=dtype)
            self._constants[key] = made.to(self.tensor.device)
        return self._constants[key]


@dataclass(frozen=True, eq=False)
class Copy:
    """targets <- sources."""

    targets: Sequence[Tensor]
    sources: Sequence[Tensor]

    def run(self, seed: int, kind: str) -> None:
        for target, source in zip(self.targets, self.sources, strict=True):
            target.copy_(source)

    def shape(self, draw: int) -> tuple[Any, ...]:
        return tuple(x.data_ptr() for x in (*self.targets, *self.sources))


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an update op.

    Attributes:
        name: of the op.
        params, streams, quanta, draws, factors, round_draw: as the op has them.
        states: what it keeps, a list for each kind.
        options: further keyword arguments of the public function.
        hyper: the numbers that its schema has in their place.
    """

    name: str
    params: Sequence[Tensor]
    streams: Sequence[int]
    draws: Sequence[int]
    factors: Sequence[float]
    hyper: Sequence[float] = (1.0,)
    options: dict[str, Any] = field(default_factory=dict)
    states: Sequence[Sequence[Tensor] | None] = ()
    quanta: Sequence[float] | None = None
    round_draw: int | None = None

    _functions: ClassVar[dict[str, Any]] = {
        "add_noise_": add_noise_,
        "zo_sgd_": zo_sgd_,
        "zo_adam_": zo_adam_,
    }

    def run(self, seed: int, kind: str) -> None:
        self._functions[self.name](
            *(self.params, *self.states, self.streams, seed, self.draws, self.factors),
            **self.options,
            kind=kind,
            quanta=self.quanta,
            round_draw=self.round_draw,
        )

    def run_at(
        self, base: Base, seed: int, kind: str, numbers: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """The same with what lies on the device: the base of the draws, and factors and hyper."""
        draws = [draw - base.first for draw in self.draws]
        round_draw = None if self.round_draw is None else self.round_draw - base.first
        factors, hyper = numbers or (
            base.constant(self.factors, torch.float32),
            base.constant(self.hyper, torch.float32),
        )
        grids = _updates.grids(self.name, self.params, self.quanta)
        if self.name == "add_noise_":
            hyper = hyper.reshape(())
        sign = [self.options.get("sign", False)] if self.name == "zo_sgd_" else []
        args = (
            *(list(self.params), *(list(x or ()) for x in self.states), list(self.streams), seed),
            *(draws, factors, hyper, *sign, kind, grids, round_draw),
        )
        where = base.constant((*draws, round_draw or 0), torch.int64)
        _updates.run_at(OPS[self.name], args, base.tensor, where)

    def numbers(self) -> Tensor:
        """Factors and hyper, fp32 on the CPU."""
        return _updates.float32(self.name, "numbers", [*self.factors, *self.hyper])

    def shape(self, draw: int) -> tuple[Any, ...]:
        """All but the numbers, with draws that count from `draw`: what a graph can't change."""
        tensors = [x for xs in (self.params, *(s or () for s in self.states)) for x in xs]
        return (
            *(self.name, self.options.get("sign"), len(self.params)),
            *((id(x), x.data_ptr()) for x in tensors),
            *(*self.streams, *(d - draw for d in self.draws), *(self.quanta or ())),
            self.round_draw is None,
        )


Action = Call | Copy


def adding(
    params: Sequence[Tensor],
    streams: Sequence[int],
    terms: Sequence[tuple[int, float]],
    quanta: Sequence[float] | None = None,
    round_draw: int | None = None,
) -> list[Call]:
    """scale * z(draw) of every term is added, in one pass over the parameters."""
    if not terms:
        return []
    draws, scales = zip(*terms, strict=True)
    call = Call("add_noise_", params, streams, draws, scales, quanta=quanta, round_draw=round_draw)
    return [call]
