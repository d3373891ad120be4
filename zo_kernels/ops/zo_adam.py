# SPDX-License-Identifier: Apache-2.0
"""`zo_adam_`: a step of Adam on g = sum_j coeffs[j] * z(seed, draws[j], stream, .).

    m <- m + (1 - beta1) (g - m),    v <- beta2 v + (1 - beta2) g^2
    p <- (1 - lr weight_decay) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + adam_eps)

Adam (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019) on the gradient
estimate of forward passes, which is regenerated in registers: the memory traffic is one read and
one write of p and of both moments, and nothing of the size of a parameter is allocated.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zo_kernels import _arithmetic
from zo_kernels._registry import Example, define
from zo_kernels.ops import _updates

SCHEMA = (
    "zo_adam_(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "int[] streams, SymInt seed, SymInt[] draws, Tensor coeffs, Tensor hyper, str kind, "
    "Tensor? quanta=None, SymInt? round_draw=None) -> ()"
)


def _check(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    coeffs: Tensor,
    hyper: Tensor,
    kind: str,
    quanta: Tensor | None = None,
    round_draw: int | None = None,
) -> None:
    numbers = {"coeffs": (coeffs, (len(draws),)), "hyper": (hyper, (7,))}
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _updates.check("zo_adam_", params, states, streams, numbers, kind, quanta, round_draw)


def zo_adam_ref(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    coeffs: Tensor,
    hyper: Tensor,
    kind: str,
    quanta: Tensor | None = None,
    round_draw: int | None = None,
) -> None:
    """hyper: as in `zo_kernels._arithmetic.zo_adam`."""
    rule, states, terms = _arithmetic.zo_adam, (exp_avgs, exp_avg_sqs), (streams, seed, draws)
    _updates.reference(rule, params, states, *terms, coeffs, hyper, kind, quanta, round_draw)


def _examples() -> Iterator[Example]:
    hyper = torch.tensor([0.1, 0.999, 1e-3, 500.0, 1e-3, -5e-3, 0.99])
    for params, *terms, kind, quanta, round_draw in _updates.examples():
        m = [torch.linspace(-1, 1, p.numel()).view(p.shape) for p in params]
        yield params, m, [x * x for x in m], *terms, hyper, kind, quanta, round_draw


_op = define(
    SCHEMA,
    reference=zo_adam_ref,
    fake=_check,
    device_of=_updates.device_of,
    examples=_examples,
    backends=_updates.backends("zo_adam_"),
)


def zo_adam_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    coeffs: Sequence[float] | Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
    weight_decay: float = 0.0,
    kind: str = "normal",
    quanta: Sequence[float] | Tensor | None = None,
    round_draw: int | None = None,
) -> None:
    """In place: Adam's update of p and both moments by g = sum_j coeffs[j] * z(seed, draws[j], .).

    g is summed in that order from 0. Everything is computed in fp32, step by step as in
    `zo_kernels._arithmetic`, and p is rounded to its dtype once: bit for bit the same on every
    backend. The factors of a step are made in fp64 and rounded to fp32 once.

    Args:
        params: fp32, bf16 or fp16, any shape, all on one device; strided ones take the reference.
        exp_avgs, exp_avg_sqs: both moments of each parameter, fp32, contiguous and of its shape,
            zeros before the first step.
        streams, seed, draws, kind: as in `add_noise_`.
        coeffs: one factor for each draw, such as a projected gradient over the number of draws;
            rounded to fp32. A float32 tensor on the CPU is not tested for nan.
        step: t after this step: 1 for the first.
        lr: step size, in p: about what an element moves in a step.
        betas: shares of both moments that the step keeps, in [0, 1).
        adam_eps: added to the root, in loss / p like a gradient.
        weight_decay: decoupled decay rate: the step takes away the share lr weight_decay of p.
        quanta, round_draw: as in `add_noise_`: of fp32 parameters (1 - lr weight_decay) p and the
            step are rounded to multiples of a power of two each, then added; 16-bit results are
            rounded at random. Neither touches the moments.

    Raises:
        TypeError: a parameter has another dtype.
        ValueError: lengths, shapes or devices don't match, a number is out of range or not finite,
            or a tensor comes twice.

    Example:
        >>> w, m, v = torch.zeros(3), torch.zeros(3), torch.zeros(3)
        >>> zo_adam_([w], [m], [v], [0], seed=1, draws=[0], coeffs=[0.7], step=1, lr=1e-3)
    """
    params, streams, seed, draws, quanta, round_draw = _updates.normalized(
        "zo_adam_", params, streams, seed, draws, quanta, round_draw
    )
    moments = list(exp_avgs), list(exp_avg_sqs)
    if not isinstance(coeffs, Tensor):
        coeffs = _updates.float32("zo_adam_", "coeffs", coeffs)
    numbers = _arithmetic.adam_hyper(step, lr, betas, adam_eps, weight_decay)
    hyper = _updates.float32("zo_adam_", "hyper", numbers)
    args = (params, *moments, streams, seed, draws, coeffs, hyper, kind, quanta, round_draw)
    _check(*args)
    _op(*args)
