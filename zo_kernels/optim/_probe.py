# SPDX-License-Identifier: Apache-2.0
"""How theta + sign eps z gets under one evaluation, and out again.

| probe      | weights after the probes of a step        | memory while a step runs               |
|------------|-------------------------------------------|----------------------------------------|
| `virtual`  | never written                             | one perturbed tensor at a time         |
| `snapshot` | the exact bits, in every dtype            | a copy of the trained parameters       |
| `in_place` | the exact bits in fp32, which is put on a | nothing                                |
|            | grid once (see `_grid`); bf16 and fp16    |                                        |
|            | drift by more than a step learns          |                                        |

Passes over the weights (a read and a write) of a two-sided step with n = 1 and no state: `in_place`
3, or 2 with `keep_perturbed`; `snapshot` 6; `virtual` 1, and a read and a copy in each evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from zo_kernels.ops import add_noise_
from zo_kernels.optim._virtual import Virtual

PROBES = ("auto", "virtual", "snapshot", "in_place")
SNAPSHOT_BYTES = 16 * 2**20  # what `auto` copies without asking: a token, a LoRA, a small model

Term = tuple[int, float]  # (draw, scale): scale * z(draw)


class Span(NamedTuple):
    """The trained parameters of one group on one device: what one call of an op can take."""

    params: list[Tensor]
    streams: list[int]
    group: dict[str, Any]
    quanta: list[float] | None = None  # grid of each parameter, 0 for none

    def add(
        self, terms: Sequence[Term], seed: int, kind: str, round_draw: int | None = None
    ) -> None:
        """Adds scale * z(draw) of every term, in one pass over the parameters."""
        if terms:
            draws, scales = zip(*terms, strict=True)
            add_noise_(
                self.params,
                self.streams,
                seed,
                draws,
                scales,
                kind=kind,
                quanta=self.quanta,
                round_draw=round_draw,
            )

    def snap(self) -> None:
        """Moves each weight to the nearest point of its grid."""
        add_noise_(self.params, self.streams, 0, [], [], quanta=self.quanta)


class Probe(Protocol):
    """Puts one perturbation at a time under the evaluations."""

    def write(self, draw: int, sign: float) -> None:
        """From now on the weights are theta + sign eps z(draw)."""

    def reading(self) -> AbstractContextManager[Any]:
        """Holds while the model is evaluated."""

    def release(self, number: int) -> list[Term]:
        """Terms that the caller has to add to span `number` to make it theta again."""

    def restore(self) -> None:
        """The weights are theta again, whatever happened."""

    def check(self, owner: str) -> None:
        """Raises RuntimeError if the evaluations cannot have seen the perturbations."""


class Snapshot:
    """Each perturbation is added to a fresh copy of the saved weights: one rounding, none kept."""

    def __init__(self, spans: Sequence[Span], seed: int, kind: str) -> None:
        self.spans, self.seed, self.kind = spans, seed, kind
        self.saved = [[p.detach().clone() for p in span.params] for span in spans]

    def write(self, draw: int, sign: float) -> None:
        self.restore()
        if sign:
            for span in self.spans:
                span.add([(draw, sign * span.group["eps"])], self.seed, self.kind)

    def reading(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def check(self, owner: str) -> None:
        pass

    def release(self, number: int) -> list[Term]:
        for p, original in zip(self.spans[number].params, self.saved[number], strict=True):
            p.copy_(original)
        return []

    def restore(self) -> None:
        for number in range(len(self.spans)):
            self.release(number)


class InPlace:
    """Moves from one perturbation to the next in one pass over the weights, as MeZO does.

    held: what is in the weights now, a term for each span.
    """

    def __init__(
        self, spans: Sequence[Span], seed: int, kind: str, held: Sequence[Term | None] | None = None
    ) -> None:
        self.spans, self.seed, self.kind = spans, seed, kind
        self.held: list[Term | None] = list(held) if held else [None] * len(spans)

    def write(self, draw: int, sign: float) -> None:
        for number, span in enumerate(self.spans):
            term = (draw, sign * span.group["eps"]) if sign else None
            if term != self.held[number]:
                added = [*self.release(number), term] if term else self.release(number)
                span.add(added, self.seed, self.kind)
                self.held[number] = term

    def reading(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def check(self, owner: str) -> None:
        pass

    def release(self, number: int) -> list[Term]:
        term, self.held[number] = self.held[number], None
        return [(term[0], -term[1])] if term else []

    def restore(self) -> None:
        self.write(0, 0.0)


def choose(name: str, params: Sequence[Tensor]) -> str:
    """What `auto` stands for: a snapshot of little, else in place in fp32 and virtual below."""
    if name != "auto":
        return name
    if sum(p.numel() * p.element_size() for p in params) <= SNAPSHOT_BYTES:
        return "snapshot"
    return "in_place" if all(p.dtype == torch.float32 for p in params) else "virtual"


def make_probe(name: str, spans: Sequence[Span], seed: int, kind: str) -> Probe:
    """The probe called `name`, one of PROBES without `auto`."""
    kinds = {"snapshot": Snapshot, "in_place": InPlace, "virtual": Virtual}
    return kinds[name](spans, seed, kind)
