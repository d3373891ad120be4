# SPDX-License-Identifier: Apache-2.0
"""The Subspace Gradient against equations 4 to 8 of its paper, written out in numpy."""

import numpy as np
import pytest
import torch

from persona.subspace import SubspaceGradient

DIM, TAU, NU = 24, 8, 1e-2


def tokens(count, seed=0):
    """A random walk: a few directions of large steps, the others small."""
    generator = np.random.default_rng(seed)
    steps = generator.normal(size=(count, DIM)) * np.geomspace(1, 1e-3, DIM)
    mixed = steps @ generator.normal(size=(DIM, DIM))
    return torch.from_numpy(mixed.cumsum(0)).float()


def paper_basis(buffer, nu):
    """P_nu of a full buffer [tau, d], line by line."""
    b = buffer.astype(np.float64)
    b_bar = (b - b.mean(0)) / b.std(0)  # (4)
    _, sigma, vt = np.linalg.svd(b_bar, full_matrices=False)  # (5)
    eigenvalues = sigma**2
    share = 0.0
    for i in range(1, len(eigenvalues) + 1):  # (6)
        share = eigenvalues[:i].sum() / eigenvalues.sum()
        if share > 1 - nu:
            break
    return vt[i:], b_bar  # (7): rows i* + 1 to tau


@pytest.mark.parametrize("nu", [1e-3, 1e-2, 0.3])
def test_it_is_the_papers_algorithm(nu):
    subspace = SubspaceGradient(DIM, tau=TAU, nu=nu)
    walk = tokens(3 * TAU + 2)
    gradients = tokens(len(walk), seed=1)
    buffer, basis = np.zeros((TAU, DIM)), np.zeros((0, DIM))
    for step, (token, gradient) in enumerate(zip(walk, gradients, strict=True), start=1):
        g = gradient.double().numpy()
        expected = g @ (np.eye(DIM) - basis.T @ basis)  # (8)
        got = subspace.project(gradient).double().numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(g).max())
        subspace.observe(token)
        buffer[(step - 1) % TAU] = token.numpy()
        if step % TAU == 0:
            basis, b_bar = paper_basis(buffer, nu)
            assert len(subspace.basis) == len(basis) > 0
            # A centred buffer has rank tau - 1: any direction without variance may come last.
            basis[-1] = subspace.basis[-1].numpy()
            assert np.abs(b_bar @ basis[-1]).max() < 1e-4
    assert subspace.updates == 3


def test_projecting_twice_changes_nothing_more():
    subspace = SubspaceGradient(DIM, tau=TAU, nu=NU)
    for token in tokens(TAU):
        subspace.observe(token)
    gradient = torch.randn(2, DIM // 2, generator=torch.Generator().manual_seed(0))
    once = subspace.project(gradient)
    assert once.shape == gradient.shape and not torch.equal(once, gradient)
    torch.testing.assert_close(subspace.project(once), once)
    assert (subspace.basis @ once.reshape(-1)).abs().max() < 1e-5


def test_the_random_control_removes_as_many_directions():
    paper = SubspaceGradient(DIM, tau=TAU, nu=NU)
    control = SubspaceGradient(DIM, tau=TAU, nu=NU, mode="random", seed=3)
    for token in tokens(2 * TAU):
        paper.observe(token)
        control.observe(token)
    assert control.basis.shape == paper.basis.shape
    identity = torch.eye(len(control.basis))
    torch.testing.assert_close(control.basis @ control.basis.T, identity, atol=1e-5, rtol=0)
    assert not torch.allclose(control.basis, paper.basis, atol=0.1)


def test_off_returns_the_gradient():
    subspace = SubspaceGradient(DIM, tau=TAU, nu=NU, mode="off")
    for token in tokens(2 * TAU):
        subspace.observe(token)
    gradient = tokens(1)[0]
    assert torch.equal(subspace.project(gradient), gradient) and subspace.updates == 0


@pytest.mark.parametrize("mode", ["subspace", "random"])
def test_a_token_that_does_not_move_removes_nothing_and_makes_no_nan(mode):
    subspace = SubspaceGradient(DIM, tau=TAU, nu=NU, mode=mode)
    for _ in range(TAU):
        subspace.observe(torch.ones(DIM))
    assert subspace.updates == 1 and subspace.basis.shape == (0, DIM)
    gradient = tokens(1)[0]
    assert torch.equal(subspace.project(gradient), gradient)


def test_a_buffer_longer_than_the_token_is_wide():
    subspace = SubspaceGradient(4, tau=16, nu=NU)
    for token in tokens(16)[:, :4]:
        subspace.observe(token)
    assert torch.isfinite(subspace.project(torch.ones(4))).all()


@pytest.mark.parametrize("mode", ["subspace", "random"])
def test_state_goes_on_where_it_was_taken(mode):
    walk = tokens(3 * TAU)
    straight = SubspaceGradient(DIM, tau=TAU, nu=NU, mode=mode)
    first = SubspaceGradient(DIM, tau=TAU, nu=NU, mode=mode)
    for token in walk:
        straight.observe(token)
    for token in walk[: TAU + 3]:
        first.observe(token)
    resumed = SubspaceGradient(DIM, tau=TAU, nu=NU, mode=mode)
    resumed.load_state_dict(first.state_dict())
    for token in walk[TAU + 3 :]:
        resumed.observe(token)
    assert torch.equal(resumed.basis, straight.basis)
    assert (resumed.filled, resumed.updates) == (straight.filled, straight.updates)


@pytest.mark.parametrize("bad", [{"mode": "none"}, {"tau": 1}, {"nu": 1.0}, {"nu": -0.1}])
def test_arguments_out_of_range(bad):
    with pytest.raises(ValueError, match=f"SubspaceGradient: {next(iter(bad))} must be"):
        SubspaceGradient(DIM, **bad)
