# SPDX-License-Identifier: Apache-2.0
"""What the docstrings of all zeroth-order optimizers have in common."""

from typing import TypeVar

T = TypeVar("T")

_COMMON = """n (int, default 1): directions a step.
        estimator (str, default "two_sided"): "two_sided", 2n forward passes a step, or "one_sided",
            n + 1.
        kind (str, default "normal"): distribution of the directions, "normal" or "rademacher".
        seed (int, default 0): key of the noise, a signed 64-bit integer.
        maximize (bool, default False): climb, for a closure that returns a reward.
        probe (str, default "auto"): how a perturbation gets under an evaluation.
            "virtual": the weights are never written; each torch function that reads one gets a
            perturbed copy for the call. Memory: the largest tensor. Not for compiled models.
            "in_place": the weights are written; memory: nothing. fp32 weights are put on a grid of
            23 bits once, which moves them by at most 2^-22 of the largest of their tensor, and then
            come back to the bit; bf16 and fp16 weights drift by more than they learn.
            "snapshot": the weights are written, and come back from a copy; memory: that copy.
            "auto": "snapshot" up to 16 MiB of parameters, else "in_place" if all are fp32, else
            "virtual".
        keep_perturbed (bool, default False): with "in_place" and "two_sided", end a step with the
            next perturbation in the weights already: two passes over them instead of three. Call
            `eval()` before you evaluate or save the model.
        clip (float, default None): bound of each directional derivative, in loss / z (QZO).
        normalize (bool, default False): divide the estimate by the spread of the losses over eps
            (FZOO); lr is then the length of a step along z, in theta.
        scalar_beta (float, default None): divide the estimate by the root of one running mean
            square of the directional derivatives, whose share this is to keep (MEAZO).

    bf16 and fp16 weights are rounded stochastically in the update, with bits from the counter: what
    a step adds is kept in the mean, however small. Losses that are NaN or infinite reject the step.
    """

_DESCENT = """\
eps (float, default 1e-3): radius of the probes, in theta; above one ulp of the weights.
        momentum (float, default 0.0): share of b that a step keeps; no unit, in [0, 1).
        weight_decay (float, default 0.0): decoupled decay rate, in 1 / lr: a step takes away the
            share lr weight_decay of each weight."""

_MOMENTUM_STATE = """\
| state                    | bytes per trained parameter                       |
    |--------------------------|---------------------------------------------------|
    | momentum = 0             | 0                                                 |
    | momentum > 0             | 4 (`momentum_buffer`, fp32)                       |"""

_PROBES = """| probe `virtual`          | the largest tensor, while a function reads it     |
    | probe `snapshot`         | size of its dtype, while a step runs              |
    | probe `in_place`         | 0                                                 |"""


_TEXTS = {
    "{common}": _COMMON.rstrip(),
    "{probes}": _PROBES,
    "{descent}": _DESCENT,
    "{momentum_state}": _MOMENTUM_STATE,
}


def documented(cls: type[T]) -> type[T]:
    """Fills the names in braces in the docstring of an optimizer."""
    if cls.__doc__:  # python -OO has none
        for name, text in _TEXTS.items():
            cls.__doc__ = cls.__doc__.replace(name, text)
    return cls
