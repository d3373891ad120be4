# SPDX-License-Identifier: Apache-2.0
"""ZOSGD: stochastic gradient descent on a gradient that forward passes estimate.

    b <- momentum b + g_hat,    theta <- (1 - lr weight_decay) theta - lr b

g_hat = sum_j c_j z_j is never stored: the noise is generated again where it is added. Without
momentum, b is g_hat and the update is one pass over the weights. With n = 1, two-sided, it is
MeZO (Malladi et al. 2023, arXiv 2305.17333, Algorithm 1), weight decay included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Unpack

from torch import Tensor

from zo_kernels._arithmetic import sgd_hyper
from zo_kernels.optim._base import Shared
from zo_kernels.optim._calls import Call
from zo_kernels.optim._docs import documented
from zo_kernels.optim._probe import Span
from zo_kernels.optim._step import ZOOptimizer


def sgd_update_(
    params: Sequence[Tensor],
    streams: Sequence[int],
    buffers: Sequence[Tensor] | None,
    *,
    seed: int,
    draws: Sequence[int],
    coeffs: Sequence[float],
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    sign: bool = False,
    kind: str = "normal",
    quanta: Sequence[float] | None = None,
    round_draw: int | None = None,
) -> None:
    """The update above, in place, with g_hat = sum_j coeffs[j] z(seed, draws[j], stream, .).

    Args:
        params: tensors of any shape, fp32, bf16 or fp16; streams: one for each.
        buffers: b of each parameter, fp32 and of its shape; None for no momentum.
        sign: step by the sign of b, as `ZOSignSGD` does.
        quanta, round_draw: as in `zo_kernels.ops.add_noise_`.
    """
    numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "sign": sign}
    call = _call(params, streams, buffers, draws, coeffs, quanta, round_draw, **numbers)
    call.run(seed, kind)


def _call(
    params: Sequence[Tensor],
    streams: Sequence[int],
    buffers: Sequence[Tensor] | None,
    draws: Sequence[int],
    coeffs: Sequence[float],
    quanta: Sequence[float] | None,
    round_draw: int | None,
    **numbers: Any,
) -> Call:
    """The call that makes the update; without state it is one of noise alone."""
    lr, sign = numbers["lr"], numbers["sign"]
    rounding: dict[str, Any] = {"quanta": quanta, "round_draw": round_draw}
    if buffers is None and not sign:
        decay, scales = 1.0 - lr * numbers["weight_decay"], [-lr * c for c in coeffs]
        more: dict[str, Any] = {"hyper": (decay,), "options": {"decay": decay}}
        return Call("add_noise_", params, streams, draws, scales, **more, **rounding)
    hyper = sgd_hyper(lr, numbers["momentum"], numbers["weight_decay"])
    return Call(
        *("zo_sgd_", params, streams, draws, coeffs, hyper, numbers),
        states=(buffers,),
        **rounding,
    )


class Descent(ZOOptimizer):
    """What ZOSGD and ZOSignSGD share: everything but what a step is."""

    sign: bool

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
    ) -> list[Call]:
        group = span.group
        buffers = None
        if group["momentum"]:
            buffers = [self._moment(p, "momentum_buffer") for p in span.params]
        call = _call(
            *(span.params, span.streams, buffers, draws, coeffs, span.quanta, round_draw),
            lr=float(group["lr"]),
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            sign=self.sign,
        )
        return [call]


@documented
class ZOSGD(Descent):
    """Stochastic gradient descent by forward passes only; see `zo_kernels.optim.zosgd`.

        optimizer = ZOSGD(model.named_parameters(), lr=1e-6, eps=1e-3)
        loss = optimizer.step(lambda: model(inputs, labels=labels).loss)

    A parameter is trained if it requires grad at that step. Groups may set lr, eps, momentum,
    weight_decay and maximize. The global random state is neither read nor written.

    {momentum_state}
    {probes}

    Args:
        params: parameters, named parameters (their noise is then independent of their order), or
            groups of either.
        lr (float, default 1e-6): step size, in theta^2 / loss: a step is lr times a gradient.
        {descent}
        {common}

    Raises:
        ValueError: an argument out of its bound.
    """

    sign = False

    def _as_noise(self, group: dict[str, Any], coeffs: Sequence[float]) -> list[float] | None:
        lr = float(group["lr"])
        plain = not group["momentum"] and not lr * group["weight_decay"]
        return [-lr * c for c in coeffs] if plain else None
