# SPDX-License-Identifier: Apache-2.0
"""One step in the making: its evaluations, asked and told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from numbers import Real
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from zo_kernels.optim._probe import Probe, Span

Closure = Callable[[], "float | Tensor"]


class Evaluation:
    """One forward pass of a step: `with evaluation:` puts theta + sign eps z under the model.

    Grad mode is off inside. When the block raises, the weights are theta again at once; when it
    ends, they may stay perturbed until the next evaluation, `tell` or `cancel`.

    Attributes:
        draw: the direction z.
        sign: 1.0, -1.0, or 0.0 for theta itself.
    """

    def __init__(self, probe: Probe, draw: int, sign: float) -> None:
        self.draw, self.sign = draw, sign
        self._probe = probe
        self._open: ExitStack | None = None

    def __enter__(self) -> Evaluation:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            self._probe.write(self.draw, self.sign)
            stack.enter_context(self._probe.reading())
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._open is not None
        try:
            self._open.__exit__(kind, error, trace)
        except BaseException:
            kind = RuntimeError
            raise
        finally:
            if kind is not None:
                with torch.no_grad():
                    self._probe.restore()


class Round:
    """What lies between `probes` and `tell`.

    apply: what updates the weights in place of the optimizer, given this and the coefficients.
    """

    apply: Callable[[Round, list[list[float]]], None] | None = None

    def __init__(self, spans: list[Span], probe: Probe, plan: Sequence[tuple[int, float]]) -> None:
        self.spans, self.probe, self.plan = spans, probe, plan
        self.evaluations = [Evaluation(probe, draw, sign) for draw, sign in plan]


def own(loss: object, owner: str) -> Any:
    """The loss itself: a CUDA graph returns the same buffer every time.

    Raises:
        TypeError: not a number, nor a tensor of one element.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.detach().clone()
    if isinstance(loss, Real):
        return loss
    got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise TypeError(
        f"{owner}: closure must return a float or a one-element tensor, got {got}; "
        "reduce the loss to one number and return it"
    )
