# SPDX-License-Identifier: Apache-2.0
"""How theta + sign eps z gets into the weights for one evaluation, and out of them again.

| probe      | weights after the probes of a step              | memory while the step runs        |
|------------|-------------------------------------------------|-----------------------------------|
| `snapshot` | the exact bits, in every dtype                  | a copy of the trained parameters  |
| `in_place` | off by the roundings of adding and subtracting  | nothing                           |
|            | eps z: an ulp or so in fp32, and in bf16 and    |                                   |
|            | fp16 more than a step learns                    |                                   |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from zo_kernels.ops import add_noise_

Closure = Callable[[], "float | Tensor"]

PROBES = ("auto", "snapshot", "in_place")
SNAPSHOT_BYTES = 16 * 2**20  # what `auto` copies without asking: a token, a LoRA, a small model


class Span(NamedTuple):
    """The trained parameters of one group on one device: what one call of an op can take."""

    params: list[Tensor]
    streams: list[int]
    group: dict[str, Any]


class Probe(Protocol):
    """Writes one perturbation at a time; `restore` takes the last one out."""

    def write(self, draw: int, sign: float) -> None: ...

    def restore(self) -> None: ...


class Snapshot:
    """Each perturbation is added to a fresh copy of the saved weights: one rounding, none kept."""

    def __init__(self, spans: Sequence[Span], seed: int, kind: str) -> None:
        self.spans, self.seed, self.kind = spans, seed, kind
        self.saved = [[p.detach().clone() for p in span.params] for span in spans]

    def write(self, draw: int, sign: float) -> None:
        self.restore()
        if sign:
            for params, streams, group in self.spans:
                scales = [sign * group["eps"]]
                add_noise_(params, streams, self.seed, [draw], scales, kind=self.kind)

    def restore(self) -> None:
        for span, saved in zip(self.spans, self.saved, strict=True):
            for p, original in zip(span.params, saved, strict=True):
                p.copy_(original)


class InPlace:
    """Moves from one perturbation to the next in one pass over the weights, as MeZO does."""

    def __init__(self, spans: Sequence[Span], seed: int, kind: str) -> None:
        self.spans, self.seed, self.kind = spans, seed, kind
        self.draw, self.sign = 0, 0.0  # what is in the weights now

    def write(self, draw: int, sign: float) -> None:
        if draw == self.draw:
            terms = {draw: sign - self.sign}
        else:
            terms = {self.draw: -self.sign, draw: sign}
        terms = {d: s for d, s in terms.items() if s}
        if terms:
            for params, streams, group in self.spans:
                scales = [s * group["eps"] for s in terms.values()]
                add_noise_(params, streams, self.seed, list(terms), scales, kind=self.kind)
        self.draw, self.sign = draw, sign

    def restore(self) -> None:
        self.write(self.draw, 0.0)


def make_probe(name: str, spans: Sequence[Span], seed: int, kind: str) -> Probe:
    """The probe called `name`; `auto` is in place for large fp32 sets only, else a snapshot."""
    if name == "auto":
        params = [p for span in spans for p in span.params]
        small = sum(p.numel() * p.element_size() for p in params) <= SNAPSHOT_BYTES
        drifts = any(p.dtype != torch.float32 for p in params)
        name = "snapshot" if small or drifts else "in_place"
    return Snapshot(spans, seed, kind) if name == "snapshot" else InPlace(spans, seed, kind)


def evaluate(
    closure: Closure, probe: Probe, plan: Iterable[tuple[int, float]], owner: str
) -> list[float]:
    """The loss at each (draw, sign) of the plan; the weights are restored whatever happens."""
    losses = []
    try:
        for draw, sign in plan:
            probe.write(draw, sign)
            losses.append(_own(closure(), owner))
    finally:
        probe.restore()
    # Read back only here, when a device has all evaluations in its queue.
    return [float(loss) for loss in losses]


def _own(loss: object, owner: str) -> Any:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.detach().clone()  # a CUDA graph returns the same buffer every time
    if isinstance(loss, Real):
        return loss
    got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise TypeError(
        f"{owner}: closure must return a float or a one-element tensor, got {got}; "
        "reduce the loss to one number and return it"
    )
