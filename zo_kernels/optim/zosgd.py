# SPDX-License-Identifier: Apache-2.0
"""ZOSGD: stochastic gradient descent on a gradient that forward passes estimate.

    b <- momentum b + g_hat,    theta <- (1 - lr weight_decay) theta - lr b

g_hat = sum_j c_j z_j is never stored: the noise is generated again where it is added. Without
momentum, b is g_hat and the update is one pass over the weights. With n = 1, two-sided, it is
MeZO (Malladi et al. 2023, arXiv 2305.17333, Algorithm 1), weight decay included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from zo_kernels.ops import add_noise_
from zo_kernels.optim._base import ZOOptimizer
from zo_kernels.optim._probe import Span


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
    kind: str = "normal",
) -> None:
    """The update above, in place, with g_hat = sum_j coeffs[j] z(seed, draws[j], stream, .).

    Args:
        params: tensors of any shape, fp32, bf16 or fp16; streams: one for each.
        buffers: b of each parameter, fp32 and of its shape; None for no momentum.
    """
    decay = 1.0 - lr * weight_decay
    if buffers is None:
        add_noise_(params, streams, seed, draws, [-lr * c for c in coeffs], decay, kind)
        return
    add_noise_(buffers, streams, seed, draws, coeffs, momentum, kind)
    for p, buffer in zip(params, buffers, strict=True):
        p.copy_((buffer * -lr).add_(p, alpha=decay))  # fp32, one rounding


class ZOSGD(ZOOptimizer):
    """Stochastic gradient descent by forward passes only; see `zo_kernels.optim.zosgd`.

        optimizer = ZOSGD(model.named_parameters(), lr=1e-6, eps=1e-3)
        loss = optimizer.step(lambda: model(inputs, labels=labels).loss)

    A parameter is trained if it requires grad at that step. Groups may set lr, eps, momentum,
    weight_decay and maximize. The global random state is neither read nor written.

    | state                    | bytes per trained parameter                       |
    |--------------------------|---------------------------------------------------|
    | momentum = 0             | 0                                                 |
    | momentum > 0             | 4 (`momentum_buffer`, fp32)                       |
    | probe `snapshot`         | size of its dtype, while a step runs              |
    | probe `in_place`         | 0                                                 |

    Args:
        params: parameters, named parameters (their noise is then independent of their order), or
            groups of either.
        lr (float, default 1e-6): step size, in theta^2 / loss: a step is lr times a gradient.
        eps (float, default 1e-3): radius of the probes, in theta; above one ulp of the weights.
        momentum (float, default 0.0): share of b that a step keeps; no unit, in [0, 1).
        weight_decay (float, default 0.0): decoupled decay rate, in 1 / lr: a step takes away the
            share lr weight_decay of each weight.
        n (int, default 1): directions a step.
        estimator (str, default "two_sided"): "two_sided", 2n forward passes a step, or "one_sided",
            n + 1.
        kind (str, default "normal"): distribution of the directions, "normal" or "rademacher".
        seed (int, default 0): key of the noise, a signed 64-bit integer.
        maximize (bool, default False): climb, for a closure that returns a reward.
        probe (str, default "auto"): "snapshot" restores the exact bits and holds a copy of the
            trained parameters while a step runs. "in_place" holds nothing, and adds and subtracts
            eps z: fp32 weights come back to about an ulp, bf16 and fp16 weights drift by more than
            they learn. "auto" is "in_place" for more than 16 MiB of parameters that are all fp32,
            else "snapshot".

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
        *,
        n: int = 1,
        estimator: str = "two_sided",
        kind: str = "normal",
        seed: int = 0,
        maximize: bool = False,
        probe: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(
            params, defaults, n=n, estimator=estimator, kind=kind, seed=seed, probe=probe
        )

    def _update(self, span: Span, draws: Sequence[int], coeffs: Sequence[float]) -> None:
        group = span.group
        buffers = None
        if group["momentum"]:
            buffers = [self._moment(p, "momentum_buffer") for p in span.params]
        sgd_update_(
            span.params,
            span.streams,
            buffers,
            seed=self.seed,
            draws=draws,
            coeffs=coeffs,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            kind=self.kind,
        )
