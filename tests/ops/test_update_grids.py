# SPDX-License-Identifier: Apache-2.0
"""Grids of the update ops: terms that come off give the bits back."""

import functools

import numpy as np
import pytest
import torch
from update_rules import BF16, DRAWS, F32, FACTORS, SEED, backend, values

from zo_kernels import rng
from zo_kernels.ops import add_noise_
from zo_kernels.testing import assert_same_bits

__all__ = ["backend"]


@pytest.mark.parametrize("kind", rng.KINDS)
def test_perturb_flip_restore_gives_back_the_bits(backend, kind):
    """2000 cycles with flips by equal draws, and restoring in the call that perturbs again.

    The reference, a thousand times slower, has 100 of them.
    """
    cycles = 100 if backend.name == "reference" else 2000
    quantum, eps, n = 2.0**-20, 1e-3, 200
    p = torch.round(values(n, device=backend.device) * 2**20) * quantum
    p[n // 2] = 0.0
    wanted = p.clone()
    with backend("add_noise_"):
        call = functools.partial(add_noise_, [p], [7], SEED, kind=kind, quanta=[quantum])
        call([0], [eps])
        for draw in range(cycles):
            call([draw, draw], [-eps, -eps])
            assert not torch.equal(p, wanted)
            call([draw, draw + 1], [eps, eps])
        call([cycles], [-eps])
    assert_same_bits(p, wanted)


def test_terms_come_off_in_any_order(backend):
    p = torch.round(values(1000, device=backend.device) * 2**16) * 2.0**-16
    wanted, draws, scales = p.clone(), [4, 9, 4, 1], [0.1, -0.7, 3.0, 1e-7]
    with backend("add_noise_"):
        add_noise_([p], [0], 1, draws, scales, quanta=[2.0**-16])
        add_noise_([p], [0], 1, draws[::-1], [-s for s in scales[::-1]], quanta=[2.0**-16])
    assert_same_bits(p, wanted)


@pytest.mark.parametrize("quantum", [2.0**-126, 2.0**-30, 1.0, 2.0**100])
def test_no_draws_snap_to_the_grid(backend, quantum):
    p = (values(1001, device=backend.device) * 1000 + 0.25) * quantum
    wanted = torch.from_numpy(np.rint(p.cpu().numpy().astype(np.float64) / quantum) * quantum)
    with backend("add_noise_"):
        add_noise_([p], [0], 1, [], [], quanta=torch.tensor([quantum]))
    assert_same_bits(p, wanted.float().to(p.device) + 0.0)


def test_a_quantum_of_zero_is_off(backend):
    p, twin = (values(300, device=backend.device) for _ in range(2))
    with backend("add_noise_"):
        add_noise_([p], [0], SEED, DRAWS, FACTORS, 0.9, quanta=[0.0])
        add_noise_([twin], [0], SEED, DRAWS, FACTORS, 0.9)
    assert_same_bits(p, twin)


def test_fp32_ignores_the_draw_of_rounding_and_16_bits_the_quantum(backend):
    for dtype, option in ((F32, {"round_draw": 9}), (BF16, {"quanta": torch.ones(1)})):
        p, twin = (values(300, dtype, backend.device) for _ in range(2))
        with backend("add_noise_"):
            add_noise_([p], [0], SEED, DRAWS, FACTORS, 0.9, **option)
            add_noise_([twin], [0], SEED, DRAWS, FACTORS, 0.9)
        assert_same_bits(p, twin)
