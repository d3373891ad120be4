# SPDX-License-Identifier: Apache-2.0
"""The update ops against fp64."""

import pytest
import torch
from update_rules import (
    BF16,
    DRAWS,
    F16,
    F32,
    FACTORS,
    RULES,
    SEED,
    STEPS,
    backend,
    states_of,
    values,
)

from zo_kernels import rng
from zo_kernels.testing import SIZES, assert_close_to_math

__all__ = ["backend"]


def sgd_in_fp64(p, z, states, momentum=0.0, sign=False):
    b = z if not states else momentum * states[0] + z
    return (1 - 0.03 * 0.1) * p - 0.03 * (b.sign() if sign else b), [b]


def adam_in_fp64(p, z, states):
    m, v = 0.9 * states[0] + 0.1 * z, 0.999 * states[1] + 0.001 * z * z
    change = m / (1 - 0.9**3) / ((v / (1 - 0.999**3)).sqrt() + 1e-3)
    return (1 - 0.03 * 0.1) * p - 0.03 * change, [m, v]


@pytest.mark.parametrize("kind", rng.KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rule", STEPS)
def test_mathematics(backend, rule, dtype, kind):
    op, _, count, options = RULES[rule]
    exact_rule = adam_in_fp64 if rule == "adam" else sgd_in_fp64
    more = {k: v for k, v in options.items() if k in ("momentum", "sign")}
    for n in SIZES:
        p = values(n, dtype, backend.device)
        states = states_of([p], count)
        z = torch.zeros(n, dtype=torch.float64, device=p.device)
        for draw, factor in zip(DRAWS, FACTORS, strict=True):
            where = {"seed": SEED, "draw": draw, "stream": 4, "kind": kind, "device": p.device}
            z += factor * rng.noise(n, **where).double()
        before = [] if count is None else [s[0].double() for s in states]
        exact, kept = exact_rule(p.double(), z, before, **more)
        small = [x.to(dtype) for x in before]
        by_torch, _ = exact_rule(p, z.to(dtype), small, **more)
        with backend(op.__name__):
            op([p], *states, [4], SEED, DRAWS, FACTORS, **options, kind=kind)
        assert_close_to_math(p, by_torch, exact)
        for got, x in zip(states if count else [], kept, strict=bool(count)):
            assert_close_to_math(got[0], x.float(), x)


def test_division_of_torch_is_correctly_rounded():
    """The reference divides in fp32; by way of fp64 it would be correct for sure."""
    bits = rng.round_bits(2**20, seed=1, draw=0, stream=0) << 16
    bits |= rng.round_bits(2**20, seed=1, draw=1, stream=0)
    x = bits.int().view(F32)
    a, b = x[: 2**19], x[2**19 :]
    wanted = (a.double() / b.double()).float()
    assert torch.equal((a / b).nan_to_num(), wanted.nan_to_num())
