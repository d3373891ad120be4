# SPDX-License-Identifier: Apache-2.0
"""ZOSignSGD: steps of one size along the sign of a gradient that forward passes estimate.

    theta <- (1 - lr weight_decay) theta - lr sign(b),    b <- momentum b + g_hat

Without momentum it is ZO-signSGD (Liu et al. 2019, ICLR); with it, the signed momentum of signum
(Bernstein et al. 2018, arXiv 1802.04434). Only the signs of the loss differences matter, so that
the unit of the loss does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Unpack

from zo_kernels.ops import zo_sgd_
from zo_kernels.optim._base import Shared
from zo_kernels.optim._docs import documented
from zo_kernels.optim._probe import Span
from zo_kernels.optim._step import ZOOptimizer


@documented
class ZOSignSGD(ZOOptimizer):
    """Sign descent by forward passes only; see `zo_kernels.optim.zosignsgd`.

        optimizer = ZOSignSGD(model.named_parameters(), lr=1e-6, eps=1e-3)
        loss = optimizer.step(lambda: model(inputs, labels=labels).loss)

    A parameter is trained if it requires grad at that step. Groups may set lr, eps, momentum,
    weight_decay and maximize. The global random state is neither read nor written.

    | state                    | bytes per trained parameter                       |
    |--------------------------|---------------------------------------------------|
    | momentum = 0             | 0                                                 |
    | momentum > 0             | 4 (`momentum_buffer`, fp32)                       |
    {probes}

    Args:
        params: parameters, named parameters (their noise is then independent of their order), or
            groups of either.
        lr (float, default 1e-6): what every weight moves in a step, in theta.
        eps (float, default 1e-3): radius of the probes, in theta; above one ulp of the weights.
        momentum (float, default 0.0): share of b that a step keeps; no unit, in [0, 1).
        weight_decay (float, default 0.0): decoupled decay rate, in 1 / lr: a step takes away the
            share lr weight_decay of each weight.
        {common}

    Raises:
        ValueError: an argument out of its bound.
    """

    bounds = ZOOptimizer.bounds | {
        "momentum": (lambda v: 0 <= v < 1, "in [0, 1)", "0.9 is common"),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        **shared: Unpack[Shared],
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, **shared)

    def _update(
        self, span: Span, draws: Sequence[int], coeffs: Sequence[float], round_draw: int
    ) -> None:
        group = span.group
        buffers = None
        if group["momentum"]:
            buffers = [self._moment(p, "momentum_buffer") for p in span.params]
        zo_sgd_(
            span.params,
            buffers,
            span.streams,
            self.seed,
            draws,
            coeffs,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            sign=True,
            kind=self.kind,
            quanta=span.quanta,
            round_draw=round_draw,
        )
