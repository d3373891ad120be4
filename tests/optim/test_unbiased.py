# SPDX-License-Identifier: Apache-2.0
"""The mean of 10^5 estimates is the gradient, within the bound that 99 % of such means keep."""

import math

import numpy as np
import pytest
import torch

from zo_kernels import _native
from zo_kernels.estimators import ESTIMATORS, coefficients
from zo_kernels.rng import KINDS, noise_numpy

COUNT, EPS = 10**5, 1e-3
C = _native.binding()


def quadratic(theta):  # [B, d] -> [B]
    scale = torch.linspace(0.5, 2, theta.shape[1], dtype=torch.float64)
    return (scale * (theta - 0.3).square()).sum(1) + theta.sum(1).square()


def network(theta):
    """A tanh layer of 3 units and a squared error on 5 points; 10 weights."""
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    hidden = torch.tanh(theta[:, :3, None] * x + theta[:, 3:6, None])
    out = (theta[:, 6:9, None] * hidden).sum(1) + theta[:, 9:]
    return (out - x.square()).square().mean(1)


def directions(d, kind):
    """z of draws 0 .. COUNT - 1, [COUNT, d]."""
    z = np.empty((COUNT, d), np.float32)
    for draw, row in enumerate(z):
        if C is None:
            row[:] = noise_numpy(d, seed=5, draw=draw, stream=1, kind=kind)
        else:
            C.noise_into(row, seed=5, draw=draw, stream=1, kind=kind)
    return torch.from_numpy(z).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [quadratic, network])
def test_mean_of_a_hundred_thousand_estimates(kind, loss):
    theta = torch.linspace(-1, 1, 10, dtype=torch.float64).requires_grad_()
    [gradient] = torch.autograd.grad(loss(theta[None]).sum(), theta)
    theta, z = theta.detach(), directions(10, kind)
    plus, minus, base = (
        loss(theta + EPS * z),
        loss(theta - EPS * z),
        loss(theta[None]).expand(COUNT),
    )
    for estimator in ESTIMATORS:
        pairs = zip(*((plus, minus) if estimator == "two_sided" else (base, plus)), strict=True)
        c = [coefficients([a, b], estimator=estimator, eps=EPS)[0] for a, b in pairs]
        estimates = torch.tensor(c, dtype=torch.float64)[:, None] * z
        bound = 3.29 * estimates.std(0) / math.sqrt(COUNT)  # 99 % for all 10 coordinates at once
        assert ((estimates.mean(0) - gradient).abs() < bound).all()
        assert bound.max() < 0.05 * gradient.abs().max()
