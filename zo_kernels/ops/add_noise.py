# SPDX-License-Identifier: Apache-2.0
"""`add_noise_`: p <- decay * p + sum_j scales[j] * z(seed, draws[j], stream, .).

The perturbation of MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithm 1): a perturb, a flip,
and "restore + update + next perturb" are each one call. The noise is regenerated and never stored:
the memory traffic is one read and one write of p.

Exact restoring: fp32 weights on the grid of multiples of a power of two (`quanta`) come back to
their bits. Learning in 16 bits: results are rounded at random (`round_draw`), so that steps below
half an ulp count in the mean.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zo_kernels import _arithmetic
from zo_kernels._registry import Example, define
from zo_kernels.ops import _updates

SCHEMA = (
    "add_noise_(Tensor(a!)[] params, int[] streams, SymInt seed, SymInt[] draws, Tensor scales, "
    "Tensor decay, str kind, Tensor? quanta=None, SymInt? round_draw=None) -> ()"
)
DTYPES = _updates.DTYPES


def _check(
    params: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    scales: Tensor,
    decay: Tensor,
    kind: str,
    quanta: Tensor | None = None,
    round_draw: int | None = None,
) -> None:
    numbers = {"scales": (scales, (len(draws),)), "decay": (decay, ())}
    _updates.check("add_noise_", params, {}, streams, numbers, kind, quanta, round_draw)


def add_noise_ref(
    params: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    scales: Tensor,
    decay: Tensor,
    kind: str,
    quanta: Tensor | None = None,
    round_draw: int | None = None,
) -> None:
    rule, terms = _arithmetic.add_noise, (streams, seed, draws, scales)
    _updates.reference(rule, params, (), *terms, decay, kind, quanta, round_draw)


def _examples() -> Iterator[Example]:
    for i, (*terms, kind, quanta, round_draw) in enumerate(_updates.examples()):
        yield *terms, torch.tensor(1 - 0.1 * i), kind, quanta, round_draw


_op = define(
    SCHEMA,
    reference=add_noise_ref,
    fake=_check,
    device_of=_updates.device_of,
    examples=_examples,
    backends=_updates.backends("add_noise_"),
)


def add_noise_(
    params: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    scales: Sequence[float] | Tensor,
    decay: float | Tensor = 1.0,
    kind: str = "normal",
    quanta: Sequence[float] | Tensor | None = None,
    round_draw: int | None = None,
) -> None:
    """In place: p <- decay * p + sum_j scales[j] * z(seed, draws[j], stream, .).

    Computed in fp32, in that order, and rounded to the dtype of p once. z is the noise of
    `zo_kernels.rng`, bit for bit the same on every backend and for every grouping of the params.
    Equal draws next to each other share one generation of z.

    Args:
        params: fp32, bf16 or fp16, any shape, all on one device. Element i is counted in row-major
            order, whatever the strides; strided ones take the reference, and a copy for the call.
        streams: for each parameter its number in [0, 2^32), for life.
        seed: 64-bit number of the run, signed or unsigned.
        draws: 64-bit numbers of the directions; none applies the decay alone.
        scales: one factor for each draw, in the unit of p; rounded to fp32. A float32 tensor on the
            CPU keeps `torch.compile` from compiling anew for each value; it is not tested for nan.
        decay: factor of p, such as 1 - lr * weight_decay; rounded to fp32. Likewise.
        kind: "normal", or "rademacher" for +1 and -1.
        quanta: for each fp32 parameter a power of two q, in the unit of p, or 0 for none; 16-bit
            parameters have 0. decay * p and each scales[j] * z are rounded to multiples of q, to
            the nearest, ties to even, then added one after another. Where p is such a multiple,
            and it, each term and all partial sums are below 2^22 q in magnitude, every sum is
            exact: terms that are subtracted later, in any order, give back the bits (a zero is
            +0). A tensor is a float32 one on the CPU; its values are not tested.
        round_draw: round bf16 and fp16 results at random, with 16 bits an element from this draw,
            so that their mean is the fp32 result; to the nearest without it. Values beyond the
            largest finite number round to the nearest in any case, and fp32 parameters ignore it.
            Take it from the counter that `draws` come from: a number that was used for noise must
            not be used for rounding, or the other way around, since both read the same words.

    Raises:
        TypeError: a parameter has another dtype.
        ValueError: lengths or devices don't match, a number is out of range or not finite, a
            quantum is not a power of two, or a parameter comes twice or overlaps itself.

    Example:
        >>> w = torch.zeros(3)
        >>> add_noise_([w], [0], seed=1, draws=[0], scales=[1e-3])
        >>> add_noise_([w], [0], seed=1, draws=[0], scales=[-2e-3])  # the other side
    """
    params, streams, seed, draws, quanta, round_draw = _updates.normalized(
        "add_noise_", params, streams, seed, draws, quanta, round_draw
    )
    if not isinstance(scales, Tensor):
        scales = _updates.float32("add_noise_", "scales", scales)
    if not isinstance(decay, Tensor):
        decay = _updates.float32("add_noise_", "decay", [decay])[0]
    args = (params, streams, seed, draws, scales, decay, kind, quanta, round_draw)
    _check(*args)
    _op(*args)
