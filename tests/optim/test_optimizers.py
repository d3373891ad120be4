# SPDX-License-Identifier: Apache-2.0
"""What a trainer may expect of every zeroth-order optimizer; each test runs over all of them."""

import copy

import pytest
import torch
from torch import nn

from zo_kernels.estimators import ESTIMATORS
from zo_kernels.optim import ZOSGD

PROBES = pytest.mark.parametrize("probe", ["snapshot", "in_place", "virtual"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def tensors(dtype=torch.float32):
    return [
        torch.linspace(-1, 1, 7).to(dtype).requires_grad_(),
        torch.linspace(0, 2, 12).reshape(3, 4).to(dtype).requires_grad_(),
    ]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def parabola(params):
    return sum((p.double() - 1).square().sum() for p in params)


@PROBES
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_parabola_converges(make, probe, estimator):
    params = tensors()
    optimizer = make(params, estimator=estimator, n=2, probe=probe)
    before = parabola(params).item()
    for _ in range(80):
        optimizer.step(lambda: parabola(params))
    assert parabola(params).item() < 0.1 * before


def test_rosenbrock_converges(make, name):
    xy = torch.tensor([-0.5, 1.0]).requires_grad_()
    lr = {"sgd": 0.01, "momentum": 0.005}.get(name, 0.05)
    optimizer = make([xy], lr=lr, n=2, kind="rademacher")

    def rosenbrock():
        x, y = xy.double()
        return (1 - x) ** 2 + 10 * (y - x * x) ** 2  # a valley as bent, less steep

    before = rosenbrock().item()
    for step in range(150):
        if name.startswith("sig"):  # steps of one size have to shrink
            optimizer.param_groups[0]["lr"] = lr * (1 - step / 150)
        optimizer.step(rosenbrock)
    assert rosenbrock().item() < 0.03 * before


@DTYPES
def test_every_dtype_descends(make, dtype):
    params = tensors(dtype)
    optimizer = make(params, eps=0.05, n=4)
    before = parabola(params).item()
    for _ in range(40):
        optimizer.step(lambda: parabola(params))
    assert parabola(params).item() < 0.2 * before
    assert all(p.dtype == dtype for p in params)


def test_maximize_climbs(make):
    params = tensors()
    optimizer = make(params, maximize=True, n=4)
    for _ in range(100):
        reward = optimizer.step(lambda: -parabola(params))
    assert reward > -1.0


@pytest.mark.parametrize(("estimator", "n", "calls"), [("two_sided", 3, 6), ("one_sided", 3, 4)])
def test_closure_is_called_as_often_as_promised_and_without_grad(make, estimator, n, calls):
    params, seen = tensors(), []
    optimizer = make(params, estimator=estimator, n=n)

    def closure():
        seen.append(torch.is_grad_enabled())
        return parabola(params)

    optimizer.step(closure)
    assert seen == [False] * calls
    assert all(p.grad is None for p in params)


def test_step_returns_the_loss(make):
    params = tensors()
    loss = parabola(params).item()
    assert make(params, estimator="one_sided", n=3).step(lambda: parabola(params)) == loss
    values = iter([1.0, 2.0, 3.0, 6.0])
    assert make(params, n=2).step(lambda: next(values)) == 3.0


@DTYPES
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_probes_leave_the_exact_bits(make, dtype, estimator):
    params = tensors(dtype)
    before = copy.deepcopy(params)
    optimizer = make(params, lr=0.0, estimator=estimator, n=2)
    for _ in range(20):
        optimizer.step(lambda: parabola(params))
    assert same_bits(params, before)


def test_in_place_probes_of_bf16_drift_by_more_than_small_steps_move():
    w = torch.full((1000,), 0.02, dtype=torch.bfloat16).requires_grad_()
    optimizer = ZOSGD([w], lr=0.0, probe="in_place")
    for _ in range(20):
        optimizer.step(lambda: w.sum())
    assert (w.detach().float() - 0.02).square().mean().sqrt() > 20 * 1e-6


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_rejects_the_step(make, estimator, bad):
    params = tensors()
    optimizer = make(params, estimator=estimator, n=2, weight_decay=0.1)
    optimizer.step(lambda: parabola(params))
    weights, state = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict()["state"])
    losses = iter([1.0, torch.tensor(bad), 1.0, 2.0])
    optimizer.step(lambda: next(losses))
    assert same_bits(params, weights)
    assert (optimizer.rejected, optimizer.draw) == (1, 4)  # its directions are not tried again
    for key, values in optimizer.state_dict()["state"].items():
        torch.testing.assert_close(values, state[key], rtol=0, atol=0)
    optimizer.step(lambda: parabola(params))
    assert optimizer.rejected == 1 and not same_bits(params, weights)


@pytest.mark.parametrize("fail_at", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_closure_that_raises_finds_its_weights_back(make, fail_at, error):
    params = tensors()
    before, calls = copy.deepcopy(params), iter(range(4))
    optimizer = make(params, n=2)

    def closure():
        if next(calls) == fail_at:
            raise error("stop")
        return parabola(params)

    with pytest.raises(error, match="stop"):
        optimizer.step(closure)
    assert same_bits(params, before) and optimizer.draw == 0


def test_a_closure_may_return_one_buffer_every_time(make):
    params, others, buffer = tensors(), tensors(), torch.zeros((), dtype=torch.float64)
    make(params).step(lambda: buffer.copy_(parabola(params)))
    make(others).step(lambda: parabola(others))
    assert same_bits(params, others)


@pytest.mark.parametrize("loss", [None, torch.zeros(3), "1.0"])
def test_a_closure_without_a_loss_is_refused(make, loss):
    params = tensors()
    before = copy.deepcopy(params)
    with pytest.raises(TypeError, match="closure must return a float or a one-element tensor"):
        make(params).step(lambda: loss)
    assert same_bits(params, before)


def test_no_closure_is_refused(make):
    with pytest.raises(TypeError, match=r"step: closure must be a function .* got None"):
        make(tensors()).step()


def test_global_random_state_is_untouched(make):
    params = tensors()
    optimizer = make(params, n=2)
    before = torch.get_rng_state()
    optimizer.step(lambda: parabola(params))
    assert torch.equal(torch.get_rng_state(), before)


def test_frozen_parameters_are_neither_probed_nor_trained_until_they_require_grad(make):
    params = tensors()
    params[0].requires_grad_(False)
    frozen, seen = params[0].clone(), []
    optimizer = make(params, weight_decay=0.1)

    def closure():
        seen.append(torch.equal(params[0], frozen))
        return parabola(params)

    optimizer.step(closure)
    assert seen == [True, True] and torch.equal(params[0], frozen)
    params[0].requires_grad_()
    optimizer.step(closure)
    assert seen[2:] == [False, False] and not torch.equal(params[0], frozen)


def test_nothing_to_train_is_refused(make):
    with pytest.raises(ValueError, match="requires grad, got 0 of 1; mark what to train"):
        make([torch.zeros(3)]).step(lambda: 0.0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight


def test_tied_parameters_are_probed_once(make):
    model, reach = Tied(), []
    weight = model.a.weight.detach().clone()
    twice = [*model.a.parameters(), *model.b.parameters()]
    optimizer = make(twice, eps=0.5, kind="rademacher")
    assert [len(group["params"]) for group in optimizer.param_groups] == [3]

    def closure():
        reach.append((model.a.weight - weight).abs())
        return 0.0

    optimizer.step(closure)
    for moved in reach:
        torch.testing.assert_close(moved, torch.full_like(moved, 0.5))


def test_compiled_model_and_inference_mode(make):
    weights = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager"), torch.inference_mode()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        x = torch.linspace(-1, 1, 20).reshape(5, 4)
        optimizer = make(model.parameters(), estimator="one_sided")
        forward = wrap(model.forward)
        for _ in range(5):
            optimizer.step(lambda forward=forward, x=x: forward(x).square().mean())
        weights.append(list(model.parameters()))
    assert same_bits(weights[0], weights[1]) and same_bits(weights[0], weights[2])


def test_steps_in_and_out_of_inference_mode_mix(make):
    params = tensors()
    optimizer = make(params)
    with torch.inference_mode():
        optimizer.step(lambda: parabola(params))
    optimizer.step(lambda: parabola(params))
    assert optimizer.draw == 2


def test_bits_do_not_depend_on_threads(make):
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            p = torch.linspace(-1, 1, 5000).requires_grad_()
            make([p]).step(lambda p=p: p[0].item())
            results.append(p)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_odd_shapes_and_strides(make):
    for p in (torch.ones(()), torch.ones(0), torch.ones(63), torch.ones(2, 3, 5, 4).mT):
        p.requires_grad_()
        other = torch.ones(1).requires_grad_()
        make([p, other]).step(lambda p=p: p.sum())
        assert p.isfinite().all() and (p.numel() == 0 or not torch.equal(p, torch.ones_like(p)))
