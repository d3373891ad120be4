# SPDX-License-Identifier: Apache-2.0
"""`add_noise_`, `zo_sgd_` and `zo_adam_` by numpy alone, bit for bit: what replays a training log.

Each function works in place on one parameter: a writable array of any shape that is contiguous in
row-major order, float32, float16, or uint16 for the bits of bfloat16 numbers. Arguments mean what
they mean in the op of the same name, with one `stream` and one `quantum` in place of lists.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from zo_kernels import _arithmetic, rng
from zo_kernels._xp import Numpy

DTYPES = {"float32": "float32", "float16": "float16", "uint16": "bfloat16"}


def add_noise_numpy(
    p: np.ndarray,
    stream: int,
    seed: int,
    draws: Sequence[int],
    scales: Sequence[float],
    decay: float = 1.0,
    kind: str = "normal",
    quantum: float = 0.0,
    round_draw: int | None = None,
) -> None:
    """`zo_kernels.ops.add_noise_` of one array."""
    hyper, terms = (decay,), (stream, seed, draws, scales)
    _update("add_noise", _arithmetic.add_noise, p, (), *terms, hyper, kind, quantum, round_draw)


def zo_sgd_numpy(
    p: np.ndarray,
    buffer: np.ndarray | None,
    stream: int,
    seed: int,
    draws: Sequence[int],
    coeffs: Sequence[float],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    sign: bool = False,
    kind: str = "normal",
    quantum: float = 0.0,
    round_draw: int | None = None,
) -> None:
    """`zo_kernels.ops.zo_sgd_` of one array; `buffer` is a float32 array of its shape."""
    rule, states = partial(_arithmetic.zo_sgd, sign=sign), () if buffer is None else (buffer,)
    hyper, terms = _arithmetic.sgd_hyper(lr, momentum, weight_decay), (stream, seed, draws, coeffs)
    _update("zo_sgd", rule, p, states, *terms, hyper, kind, quantum, round_draw)


def zo_adam_numpy(
    p: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    stream: int,
    seed: int,
    draws: Sequence[int],
    coeffs: Sequence[float],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
    weight_decay: float = 0.0,
    kind: str = "normal",
    quantum: float = 0.0,
    round_draw: int | None = None,
) -> None:
    """`zo_kernels.ops.zo_adam_` of one array; both moments are float32 arrays of its shape."""
    hyper = _arithmetic.adam_hyper(step, lr, betas, adam_eps, weight_decay)
    rule, states, terms = _arithmetic.zo_adam, (exp_avg, exp_avg_sq), (stream, seed, draws, coeffs)
    _update("zo_adam", rule, p, states, *terms, hyper, kind, quantum, round_draw)


def _update(
    name: str,
    rule: Callable[..., Any],
    p: np.ndarray,
    states: Sequence[np.ndarray],
    stream: int,
    seed: int,
    draws: Sequence[int],
    factors: Sequence[float],
    hyper: Sequence[float],
    kind: str,
    quantum: float,
    round_draw: int | None,
) -> None:
    if p.dtype.name not in DTYPES:
        raise TypeError(
            f"{name}_numpy: p must be float32, float16 or uint16 (bits of bfloat16), "
            f"got {p.dtype}; cast it"
        )
    if not all(x.flags.c_contiguous and x.flags.writeable for x in (p, *states)):
        raise ValueError(
            f"{name}_numpy: arrays must be writable and contiguous, got one that is not; copy it"
        )
    if any(x.dtype != np.float32 or x.shape != p.shape for x in states):
        got = [(str(x.dtype), x.shape) for x in states]
        raise ValueError(
            f"{name}_numpy: states must be float32 of shape {p.shape}, got {got}; "
            "make them by np.zeros"
        )
    where = {"seed": seed, "stream": stream}
    with np.errstate(all="ignore"):  # as in the ops: inf and nan are results
        _arithmetic.update(
            Numpy,
            rule,
            p.reshape(-1),
            [x.reshape(-1) for x in states],
            dtype=DTYPES[p.dtype.name],
            noise=partial(rng.noise_numpy, kind=kind, **where),
            round_bits=partial(rng.round_bits_numpy, **where),
            draws=draws,
            factors=[float(np.float32(x)) for x in factors],
            hyper=[float(np.float32(x)) for x in hyper],
            quantum=quantum,
            round_draw=round_draw,
        )
