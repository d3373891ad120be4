# SPDX-License-Identifier: Apache-2.0
"""The estimators against their equations, against the noise they promise, and in the mean."""

import math

import pytest
import torch

from zo_kernels.estimators import (
    ALL,
    ESTIMATORS,
    KINDS,
    Estimator,
    coefficients,
    one_point,
    one_sided,
    schedule,
    spsa_norm,
    two_sided,
)
from zo_kernels.optim import ZOSGD
from zo_kernels.rng import noise

BOTH = pytest.mark.parametrize("estimator", ESTIMATORS)
EVERY = pytest.mark.parametrize("estimator", ALL)
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


def quadratic(theta):  # [..., d] -> [...]; gradient of its first d entries: A theta + b
    scale = torch.linspace(0.5, 2.0, theta.shape[-1], dtype=torch.float64)
    x = theta.double()
    return (0.5 * scale * x * x - x).sum(-1)


def quadratic_gradient(theta):
    return torch.linspace(0.5, 2.0, theta.shape[-1], dtype=torch.float64) * theta.double() - 1


def test_schedule_lists_every_evaluation_in_order():
    assert schedule("two_sided", 2) == [(0, 1.0), (0, -1.0), (1, 1.0), (1, -1.0)]
    assert schedule("one_sided", 2) == [(0, 0.0), (0, 1.0), (1, 1.0)]
    assert schedule("one_point", 2) == [(0, 1.0), (1, 1.0), (2, 1.0)]


def test_coefficients_are_the_papers_equations():
    # SPSA: (L(theta + mu e) - L(theta - mu e)) / (2 mu), mean over n
    assert two_sided([5.0, 1.0, 2.0, 3.0], eps=0.5) == [4.0 / 1 / 2, -1.0 / 1 / 2]
    # RGE: (L(theta + mu e) - L(theta)) / mu, mean over n
    assert one_sided([1.0, 5.0, 2.0], eps=0.5) == [8.0 / 2, 2.0 / 2]
    # one-point: (L(theta + mu e_i) - L(theta + mu e_{i+1})) / mu, mean over n
    assert one_point([1.0, 5.0, 2.0], eps=0.5) == [-8.0 / 2, 6.0 / 2]


@EVERY
def test_a_batch_of_losses_and_a_list_give_the_same_coefficients(estimator):
    losses = [0.25 * i * i for i in range(1, 5 if estimator == "two_sided" else 4)]
    for dtype in (torch.float32, torch.bfloat16):
        batch = coefficients(torch.tensor(losses, dtype=dtype), estimator=estimator, eps=0.5)
        assert batch == coefficients(losses, estimator=estimator, eps=0.5)


@EVERY
@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probes_are_theta_plus_its_own_noise(estimator, kind, dtype):
    theta = torch.linspace(-1, 1, 21).reshape(3, 7).to(dtype)
    before = theta.clone()
    est = Estimator(n=2, eps=0.125, estimator=estimator, kind=kind, seed=3)
    copies = est.probes(theta, draw=10, stream=4)
    assert copies.shape == (est.evaluations, 3, 7) and copies.dtype == dtype
    for copy, (j, sign) in zip(copies, schedule(estimator, 2), strict=True):
        z = noise(21, seed=3, draw=10 + j, stream=4, kind=kind).view(3, 7)
        torch.testing.assert_close(copy, (theta.float() + sign * 0.125 * z).to(dtype))
    assert torch.equal(theta, before)


@BOTH
@ALL_KINDS
def test_gradient_is_made_of_the_directions_that_were_probed(estimator, kind):
    slope = torch.linspace(-2, 1, 12, dtype=torch.float64)
    theta = torch.zeros(12)
    est = Estimator(n=3, eps=0.5, estimator=estimator, kind=kind, seed=7)
    losses = est.probes(theta, draw=6, stream=1).double() @ slope
    z = torch.stack([noise(12, seed=7, draw=6 + j, stream=1, kind=kind) for j in range(3)]).double()
    expected = ((z @ slope)[:, None] * z).mean(0)  # exact, as the loss is linear
    estimate = est.gradient(losses, like=theta, draw=6, stream=1)
    torch.testing.assert_close(estimate, expected.float(), rtol=1e-4, atol=1e-5)


@EVERY
@ALL_KINDS
def test_mean_of_many_estimates_is_the_gradient(estimator, kind):
    d, count = 8, 800 if estimator == "one_point" else 400  # whose variance is twice the others'
    theta = torch.linspace(-1, 1, d)
    est = Estimator(n=1, eps=0.05, estimator=estimator, kind=kind, seed=11)
    draws = range(0, count * est.directions, est.directions)
    estimates = torch.stack(
        [est.gradient(quadratic(est.probes(theta, draw=k)), like=theta, draw=k) for k in draws]
    ).double()
    error = estimates.mean(0) - quadratic_gradient(theta)
    bound = 3.4 * estimates.std(0) / math.sqrt(count)  # 99 % for all 8 coordinates at once
    assert (error.abs() < bound).all()
    assert bound.max() < 0.5 * quadratic_gradient(theta).abs().max()  # a wrong factor would show


def test_spsa_norm_is_the_mean_length_of_rademacher_estimates():
    d, n, count = 12, 2, 200
    theta, slope = torch.zeros(d), torch.linspace(-1, 2, d, dtype=torch.float64)
    est = Estimator(n=n, eps=1.0, estimator="two_sided", kind="rademacher")
    squares = []
    for k in range(count):
        losses = est.probes(theta, draw=n * k).double() @ slope
        estimate = est.gradient(losses, like=theta, draw=n * k, norm_dim=d)
        squares.append(estimate.double().square().sum() / slope.square().sum())
    ratio = torch.stack(squares)
    assert abs(ratio.mean() - 1) < 2.6 * ratio.std() / math.sqrt(count)
    assert spsa_norm(768, 2) == math.sqrt(769 / 2)


def test_streams_and_draws_are_independent():
    theta = torch.zeros(4000)
    est = Estimator(n=2, eps=1.0, estimator="one_sided")
    rows = [est.probes(theta, draw=draw, stream=s)[1:] for draw in (0, 2) for s in (0, 1)]
    correlation = torch.corrcoef(torch.cat(rows))
    assert (correlation - torch.eye(8)).abs().max() < 4 / math.sqrt(4000)


def test_global_random_state_is_untouched():
    theta, est = torch.zeros(5), Estimator()
    before = torch.get_rng_state()
    est.gradient([1.0, 2.0], like=est.probes(theta, draw=0)[0], draw=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (63,), (4097,)])
def test_every_shape(shape):
    theta, est = torch.ones(shape), Estimator(n=2)
    assert est.probes(theta, draw=0).shape == (4, *shape)
    estimate = est.gradient([1.0, 0.0, 1.0, 0.0], like=theta, draw=0)
    assert estimate.shape == shape and estimate.isfinite().all()


def test_theta_may_be_strided_and_may_require_grad():
    theta = torch.arange(12.0).reshape(3, 4).t().requires_grad_()
    est = Estimator(estimator="one_sided")
    copies = est.probes(theta, draw=0)
    assert torch.equal(copies[0], theta) and not copies.requires_grad
    assert torch.equal(copies[1], est.probes(theta.detach().contiguous(), draw=0)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "Estimator: n must be an integer >= 1, got 0"),
        ({"n": 1.5}, "Estimator: n must be an integer >= 1, got 1.5"),
        ({"eps": 0.0}, "Estimator: eps must be finite and > 0, got 0.0"),
        ({"eps": math.nan}, "Estimator: eps must be finite and > 0, got nan"),
        ({"estimator": "central"}, "Estimator: estimator must be one of"),
        ({"kind": "uniform"}, "Estimator: kind must be one of"),
        ({"seed": 2**63}, "seed must be a signed 64-bit integer, got 9223372036854775808"),
        ({"seed": True}, "seed must be a signed 64-bit integer, got True"),
    ],
)
def test_errors_name_argument_bound_and_value(arguments, message):
    with pytest.raises(ValueError) as error:
        Estimator(**arguments)
    assert message in str(error.value)


def test_one_point_is_not_for_the_optimizers():
    assert Estimator(n=3, estimator="one_point").directions == 4
    assert Estimator(n=3, estimator="two_sided").directions == 3
    with pytest.raises(ValueError, match="estimator must be one of"):
        ZOSGD([torch.zeros(2, requires_grad=True)], lr=1e-3, estimator="one_point")


def test_wrong_numbers_of_losses_are_refused():
    with pytest.raises(ValueError, match="two_sided: losses must be 2n values, got 3"):
        two_sided([1.0, 2.0, 3.0], eps=1.0)
    with pytest.raises(ValueError, match="one_sided: losses must be n \\+ 1 >= 2 values, got 1"):
        one_sided([1.0], eps=1.0)
    with pytest.raises(ValueError, match="one_point: losses must be n \\+ 1 >= 2 values, got 1"):
        one_point([1.0], eps=1.0)
    with pytest.raises(ValueError, match=r"Estimator.gradient: losses must be 2 values, got 3"):
        Estimator().gradient([1.0, 2.0, 3.0], like=torch.zeros(2), draw=0)
