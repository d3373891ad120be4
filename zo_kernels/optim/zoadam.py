# SPDX-License-Identifier: Apache-2.0
"""ZOAdam: Adam (Kingma and Ba 2015) on a gradient that forward passes estimate.

    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2,    t <- t + 1
    theta <- (1 - lr weight_decay) theta - lr m_hat / (sqrt(v_hat) + adam_eps)
    m_hat = m / (1 - beta1^t),    v_hat = v / (1 - beta2^t)

As ZOODiP uses it (arXiv 2503.14868), which adds its adam_eps = 1e-3 outside the root too.
Weight decay is decoupled (AdamW). `adam_update_` is the update alone, for a gradient that the
caller has, such as one projected on a subspace.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Unpack

from torch import Tensor

from zo_kernels._arithmetic import adam_hyper
from zo_kernels.optim._base import Shared
from zo_kernels.optim._calls import Call
from zo_kernels.optim._docs import documented
from zo_kernels.optim._probe import Span
from zo_kernels.optim._step import ZOOptimizer


def adam_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """The update above, in place on `param` and both moments, computed in fp32 and rounded once.

    Args:
        param: any shape, fp32, bf16 or fp16.
        grad, exp_avg, exp_avg_sq: fp32, of the shape of `param`; the moments start at zero.
        step: t after this step: 1 for the first.
        lr, betas, adam_eps, weight_decay: as in `ZOAdam`.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(adam_eps)
    change = (exp_avg / denominator).mul_(-lr / (1 - beta1**step))
    param.copy_(change.add_(param, alpha=1 - lr * weight_decay))


@documented
class ZOAdam(ZOOptimizer):
    """Adam by forward passes only; see `zo_kernels.optim.zoadam`.

        optimizer = ZOAdam(model.named_parameters(), lr=1e-3, eps=1e-3)
        loss = optimizer.step(lambda: model(inputs, labels=labels).loss)

    A parameter is trained if it requires grad at that step. Groups may set lr, eps, betas,
    adam_eps, weight_decay and maximize. The global random state is neither read nor written.

    | state                    | bytes per trained parameter                       |
    |--------------------------|---------------------------------------------------|
    | `exp_avg`, `exp_avg_sq`  | 8 (fp32, whatever the parameter's dtype)          |
    {probes}

    Args:
        params: parameters, named parameters (their noise is then independent of their order), or
            groups of either.
        lr (float, default 1e-3): step size, in theta: about what a weight moves in a step.
        eps (float, default 1e-3): radius of the probes, in theta; above one ulp of the weights.
        betas (tuple, default (0.9, 0.999)): shares of both moments that a step keeps; no unit.
        adam_eps (float, default 1e-8): added to sqrt(v_hat), in loss / theta like a gradient. An
            estimate of d weights from n directions is sqrt((d + n - 1) / n) times as long as the
            gradient; ZOODiP uses 1e-3.
        weight_decay (float, default 0.0): decoupled decay rate, in 1 / lr: a step takes away the
            share lr weight_decay of each weight.
        {common}

    Raises:
        ValueError: an argument out of its bound.
    """

    bounds = ZOOptimizer.bounds | {
        "betas": (
            lambda v: len(v) == 2 and all(0 <= b < 1 for b in v),
            "two numbers in [0, 1)",
            "(0.9, 0.999) is common",
        ),
        "adam_eps": (lambda v: v >= 0, ">= 0", "1e-8 is common, ZOODiP uses 1e-3"),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        eps: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        **shared: Unpack[Shared],
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "betas": betas,
            "adam_eps": adam_eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **shared)

    def _update(
        self, span: Span, draws: Sequence[int], coeffs: Sequence[float], round_draw: int
    ) -> list[Call]:
        group = span.group
        numbers = {
            "lr": float(group["lr"]),
            "betas": group["betas"],
            "adam_eps": group["adam_eps"],
            "weight_decay": group["weight_decay"],
        }
        return [
            Call(
                *("zo_adam_", members.params, members.streams, draws, coeffs),
                *(adam_hyper(step, **numbers), {"step": step, **numbers}),
                states=[
                    [self._moment(p, name) for p in members.params]
                    for name in ("exp_avg", "exp_avg_sq")
                ],
                quanta=members.quanta,
                round_draw=round_draw,
            )
            for step, members in self._by_step(span)
        ]

    def _by_step(self, span: Span) -> Iterable[tuple[int, Span]]:
        """The parameters by their step, this one included: one part, but for thawed ones."""
        parts: dict[int, Span] = {}
        for i, p in enumerate(span.params):
            step = self.state[p]["step"] = self.state[p].get("step", 0) + 1
            part = parts.setdefault(step, Span([], [], span.group, span.quanta and []))
            part.params.append(p)
            part.streams.append(span.streams[i])
            if span.quanta and part.quanta is not None:
                part.quanta.append(span.quanta[i])
        return parts.items()
