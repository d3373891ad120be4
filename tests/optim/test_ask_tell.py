# SPDX-License-Identifier: Apache-2.0
"""The step in two halves, for trainers that refuse closures, and the options of the estimate."""

import math

import pytest
import torch

from zo_kernels.optim import ZOSGD


def parabola(w):
    return (w.double() - 1).square().sum()


@pytest.mark.parametrize("probe", ["snapshot", "in_place", "virtual"])
@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
def test_asking_and_telling_is_a_step(make, probe, estimator):
    a, b = (torch.linspace(-1, 1, 9).requires_grad_() for _ in range(2))
    settings = {"probe": probe, "estimator": estimator, "n": 2}
    by_closure, by_hand = make([a], **settings), make([b], **settings)
    for _ in range(4):
        expected = by_closure.step(lambda: parabola(a))
        losses = []
        for evaluation in by_hand.probes():
            with evaluation:
                assert not torch.is_grad_enabled()
                losses.append(parabola(b))
        assert by_hand.tell(losses) == expected
    assert torch.equal(a, b)


def test_micro_batches_accumulate_in_each_evaluation(make):
    """The gradient of a mean over micro-batches, not a mean of steps."""
    xs = torch.linspace(-1, 1, 8)
    whole, parts = (torch.tensor([0.5]).requires_grad_() for _ in range(2))
    one, two = make([whole], estimator="one_sided"), make([parts], estimator="one_sided")
    for _ in range(3):
        one.step(lambda: (whole.double() * xs - 1).square().mean())
        losses = []
        for evaluation in two.probes():
            with evaluation:
                each = [(parts.double() * x - 1).square().mean() for x in xs.chunk(2)]
                losses.append(sum(each) / 2)
        two.tell(torch.stack(losses))
    torch.testing.assert_close(whole, parts)


def test_order_of_asking_and_telling_is_checked(make):
    w = torch.ones(3).requires_grad_()
    optimizer = make([w], n=2)
    with pytest.raises(RuntimeError, match=r"tell: a step must be open, got none; call probes\(\)"):
        optimizer.tell([1.0] * 4)
    optimizer.probes()
    with pytest.raises(RuntimeError, match="probes: the step before must have ended"):
        optimizer.probes()
    with pytest.raises(ValueError, match="tell: losses must be 4 numbers, got 3"):
        optimizer.tell([1.0] * 3)
    optimizer.cancel()
    assert torch.equal(w, torch.ones(3)) and optimizer.draw == 0
    optimizer.cancel()


@pytest.mark.parametrize("probe", ["snapshot", "in_place", "virtual"])
def test_an_evaluation_that_raises_leaves_theta(make, probe):
    w = torch.ones(3).requires_grad_()
    optimizer = make([w], probe=probe)
    with pytest.raises(ZeroDivisionError), optimizer.probes()[0]:
        raise ZeroDivisionError
    assert torch.equal(w, torch.ones(3))


def slopes(coeffs):
    return [c * len(coeffs) for c in coeffs]


def test_clip_bounds_each_directional_derivative():
    w = torch.zeros(4).requires_grad_()
    optimizer = ZOSGD([w], eps=0.5, n=2, clip=1.5)
    [row] = optimizer._coefficients([2.0, 1.0, 5.0, 1.0])  # derivatives 1 and 4
    assert slopes(row) == [1.0, 1.5] and optimizer.clipped == 1


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
def test_normalize_makes_the_step_independent_of_the_unit_of_the_loss(estimator):
    results = []
    for unit in (1.0, 1000.0):
        w = torch.linspace(-1, 1, 9).requires_grad_()
        optimizer = ZOSGD([w], lr=0.01, n=4, normalize=True, estimator=estimator)
        for _ in range(3):
            optimizer.step(lambda w=w, unit=unit: unit * parabola(w))
        results.append(w.detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_normalize_is_the_formula_of_fzoo():
    optimizer = ZOSGD([torch.zeros(2).requires_grad_()], eps=0.1, n=3, normalize=True)
    optimizer.estimator = "one_sided"
    losses = [1.0, 1.5, 0.5, 2.5]
    [row] = optimizer._coefficients(losses)
    sigma = torch.tensor(losses[1:], dtype=torch.float64).std().item()
    assert row == pytest.approx([(loss - 1.0) / (3 * sigma) for loss in losses[1:]])


def test_scalar_beta_divides_by_one_running_root():
    optimizer = ZOSGD([torch.zeros(2).requires_grad_()], eps=0.5, scalar_beta=0.9)
    [first] = optimizer._coefficients([3.0, 1.0])  # derivative 2
    [second] = optimizer._coefficients([1.0, 5.0])  # derivative -4
    assert first == pytest.approx([1.0])
    moment = (0.9 * 0.1 * 4 + 0.1 * 16) / (1 - 0.9**2)
    assert second == pytest.approx([-4 / math.sqrt(moment)])
    twin = ZOSGD([torch.zeros(2).requires_grad_()])
    twin.load_state_dict(optimizer.state_dict())
    assert twin._coefficients([1.0, 2.0]) == optimizer._coefficients([1.0, 2.0])


def test_a_flat_loss_moves_nothing():
    for options in ({"normalize": True}, {"scalar_beta": 0.9}, {"clip": 1.0}):
        w = torch.ones(3).requires_grad_()
        ZOSGD([w], lr=0.1, **options).step(lambda: 2.0)
        assert torch.equal(w, torch.ones(3))


WRONG = [
    ({"clip": 0.0}, "clip must be None, or finite and > 0, got 0.0"),
    ({"normalize": True, "estimator": "one_sided"}, "normalize must be False with one direction"),
    ({"scalar_beta": 1.0}, r"scalar_beta must be None, or in \[0, 1\), got 1.0"),
    ({"scalar_beta": 0.9, "normalize": True}, "scalar_beta must be None with normalize"),
    ({"keep_perturbed": True}, "keep_perturbed must be False unless probe='in_place'"),
    (
        {"keep_perturbed": True, "probe": "in_place", "estimator": "one_sided"},
        "keep_perturbed must be False unless probe='in_place' and estimator='two_sided'",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make([torch.zeros(2, requires_grad=True)], **options)
