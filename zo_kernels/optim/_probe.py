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
from zo_kernels.optim._calls import Action, Base, Call, Copy, adding
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

    def adding(self, terms: Sequence[Term], round_draw: int | None = None) -> list[Call]:
        """Scale * z(draw) of every term, in one pass over the parameters."""
        return adding(self.params, self.streams, terms, self.quanta, round_draw)

    def add(self, terms: Sequence[Term], seed: int, kind: str, base: Base | None = None) -> None:
        """Adds them now, or with draws that count from a base on the device."""
        for call in self.adding(terms):
            if base is None:
                call.run(seed, kind)
            else:
                call.run_at(base, seed, kind)

    def snap(self) -> None:
        """Moves each weight to the nearest point of its grid."""
        add_noise_(self.params, self.streams, 0, [], [], quanta=self.quanta)


class Probe(Protocol):
    """Puts one perturbation at a time under the evaluations.

    base: what the draws count from, on the device, while a graph is captured.
    """

    base: Base | None

    def write(self, draw: int, sign: float) -> None:
        """From now on the weights are theta + sign eps z(draw)."""

    def reading(self) -> AbstractContextManager[Any]:
        """Holds while the model is evaluated."""

    def release(self, number: int) -> tuple[list[Action], list[Term]]:
        """What the caller has to do, then to add, to make span `number` theta again."""

    def begin(self, held: Sequence[Term | None] = ()) -> None:
        """Before the evaluations of a step: the weights are theta, but for what they hold."""

    def restore(self) -> None:
        """The weights are theta again, whatever happened."""

    def check(self, owner: str) -> None:
        """Raises RuntimeError if the evaluations cannot have seen the perturbations."""


class Snapshot:
    """Each perturbation is added to a fresh copy of the saved weights: one rounding, none kept."""

    base: Base | None = None

    def __init__(self, spans: Sequence[Span], seed: int, kind: str) -> None:
        self.spans, self.seed, self.kind = spans, seed, kind
        self.saved: list[list[Tensor]] = []
        self.taken = False

    def begin(self, held: Sequence[Term | None] = ()) -> None:
        self.taken = False

    def write(self, draw: int, sign: float) -> None:
        if self.taken:
            self.restore()
        elif self.saved:  # memory that a graph knows
            for number, span in enumerate(self.spans):
                Copy(self.saved[number], span.params).run(self.seed, self.kind)
        else:
            self.saved = [[p.detach().clone() for p in span.params] for span in self.spans]
        self.taken = True
        if sign:
            for span in self.spans:
                span.add([(draw, sign * span.group["eps"])], self.seed, self.kind, self.base)

    def reading(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def check(self, owner: str) -> None:
        pass

    def release(self, number: int) -> tuple[list[Action], list[Term]]:
        back = [Copy(self.spans[number].params, self.saved[number])] if self.taken else []
        return [*back], []

    def restore(self) -> None:
        for number in range(len(self.spans)):
            for action in self.release(number)[0]:
                action.run(self.seed, self.kind)


class InPlace:
    """Moves from one perturbation to the next in one pass over the weights, as MeZO does.

    held: what is in the weights now, a term for each span.
    """

    base: Base | None = None

    def __init__(self, spans: Sequence[Span], seed: int, kind: str) -> None:
        self.spans, self.seed, self.kind = spans, seed, kind
        self.held: list[Term | None] = [None] * len(spans)

    def begin(self, held: Sequence[Term | None] = ()) -> None:
        self.held = list(held) or [None] * len(self.spans)

    def write(self, draw: int, sign: float) -> None:
        for number, span in enumerate(self.spans):
            term = (draw, sign * span.group["eps"]) if sign else None
            if term != self.held[number]:
                out = self.release(number)[1]
                span.add([*out, term] if term else out, self.seed, self.kind, self.base)
                self.held[number] = term

    def reading(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def check(self, owner: str) -> None:
        pass

    def release(self, number: int) -> tuple[list[Action], list[Term]]:
        term, self.held[number] = self.held[number], None
        return [], [(term[0], -term[1])] if term else []

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
    kinds: dict[str, Any] = {"snapshot": Snapshot, "in_place": InPlace, "virtual": Virtual}
    probe: Probe = kinds[name](spans, seed, kind)
    return probe
