# SPDX-License-Identifier: Apache-2.0
"""`zo_sgd_`: a step of (sign) SGD with momentum on g = sum_j coeffs[j] * z(seed, draws[j], ., .).

    b <- momentum b + g,    p <- (1 - lr weight_decay) p - lr b    (sign: sign(b) in place of b)

The gradient estimate of forward passes is regenerated in registers, and the buffer and the weights
are updated in the same pass: the memory traffic is one read and one write of p and of b. Without
momentum there is no buffer. The sign is that of ZO-signSGD (Liu et al. 2019, ICLR).
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from zo_kernels import _arithmetic
from zo_kernels._registry import Example, define
from zo_kernels.ops import _updates

SCHEMA = (
    "zo_sgd_(Tensor(a!)[] params, Tensor(b!)[] buffers, int[] streams, SymInt seed, "
    "SymInt[] draws, Tensor coeffs, Tensor hyper, bool sign, str kind, Tensor? quanta=None, "
    "SymInt? round_draw=None) -> ()"
)


def _check(
    params: Sequence[Tensor],
    buffers: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    coeffs: Tensor,
    hyper: Tensor,
    sign: bool,
    kind: str,
    quanta: Tensor | None = None,
    round_draw: int | None = None,
) -> None:
    numbers = {"coeffs": (coeffs, (len(draws),)), "hyper": (hyper, (3,))}
    states = {"buffers": buffers} if buffers else {}
    _updates.check("zo_sgd_", params, states, streams, numbers, kind, quanta, round_draw)


def zo_sgd_ref(
    params: Sequence[Tensor],
    buffers: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    coeffs: Tensor,
    hyper: Tensor,
    sign: bool,
    kind: str,
    quanta: Tensor | None = None,
    round_draw: int | None = None,
) -> None:
    """hyper: (momentum, step, decay), step = -lr."""
    rule, states = partial(_arithmetic.zo_sgd, sign=sign), (buffers,) if buffers else ()
    terms = (streams, seed, draws, coeffs)
    _updates.reference(rule, params, states, *terms, hyper, kind, quanta, round_draw)


def _examples() -> Iterator[Example]:
    hyper = torch.tensor([0.9, -1e-2, 0.99])
    for i, (params, *terms, kind, quanta, round_draw) in enumerate(_updates.examples()):
        buffers = [torch.linspace(-1, 1, p.numel()).view(p.shape) for p in params] if i % 2 else []
        yield params, buffers, *terms, hyper, i % 3 == 0, kind, quanta, round_draw


_op = define(
    SCHEMA,
    reference=zo_sgd_ref,
    fake=_check,
    device_of=_updates.device_of,
    examples=_examples,
    backends=_updates.backends("zo_sgd_"),
)


def zo_sgd_(
    params: Sequence[Tensor],
    buffers: Sequence[Tensor] | None,
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    coeffs: Sequence[float] | Tensor,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    sign: bool = False,
    kind: str = "normal",
    quanta: Sequence[float] | Tensor | None = None,
    round_draw: int | None = None,
) -> None:
    """In place: b <- momentum b + g, p <- (1 - lr weight_decay) p - lr b.

    g = sum_j coeffs[j] * z(seed, draws[j], stream, .), in that order from 0. Everything is computed
    in fp32, step by step as in `zo_kernels._arithmetic`, and p is rounded to its dtype once: bit
    for bit the same on every backend.

    Args:
        params: fp32, bf16 or fp16, any shape, all on one device; strided ones take the reference.
        buffers: b of each parameter, fp32, contiguous and of its shape, zeros at first; None for
            b = g.
        streams, seed, draws, kind: as in `add_noise_`.
        coeffs: one factor for each draw, such as a projected gradient over the number of draws;
            rounded to fp32. A float32 tensor on the CPU is not tested for nan.
        lr: step size, in p^2 / loss; with `sign`, in p.
        momentum: share of b that the step keeps; 0 if there are no buffers.
        weight_decay: decoupled decay rate: the step takes away the share lr weight_decay of p.
        sign: step by the sign of b, in {-1, 0, 1}, in place of b.
        quanta, round_draw: as in `add_noise_`: of fp32 parameters (1 - lr weight_decay) p and the
            step are rounded to multiples of a power of two each, then added; 16-bit results are
            rounded at random. Neither touches b.

    Raises:
        TypeError: a parameter has another dtype.
        ValueError: lengths, shapes or devices don't match, a number is out of range or not finite,
            or a tensor comes twice.

    Example:
        >>> w, b = torch.zeros(3), torch.zeros(3)
        >>> zo_sgd_([w], [b], [0], seed=1, draws=[0], coeffs=[0.7], lr=1e-2, momentum=0.9)
    """
    params, streams, seed, draws, quanta, round_draw = _updates.normalized(
        "zo_sgd_", params, streams, seed, draws, quanta, round_draw
    )
    kept = list(buffers) if buffers is not None else []
    if not kept and momentum:
        got, advice = f"{momentum} without buffers", "give a buffer for each parameter"
        _updates.require("zo_sgd_", not params, "momentum", "0", got, advice)
    if not isinstance(coeffs, Tensor):
        coeffs = _updates.float32("zo_sgd_", "coeffs", coeffs)
    numbers = _arithmetic.sgd_hyper(lr, momentum, weight_decay)
    hyper = _updates.float32("zo_sgd_", "hyper", numbers)
    args = (params, kept, streams, seed, draws, coeffs, hyper, sign, kind, quanta, round_draw)
    _check(*args)
    _op(*args)
