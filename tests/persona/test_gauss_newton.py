# SPDX-License-Identifier: Apache-2.0
"""Gauss-Newton by forward passes, and the directions that the text encoder lets through."""

import pytest
import torch

from persona.config import TextualInversionConfig
from persona.encoder_jacobian import encoder_moment
from persona.errors import UserError
from persona.gauss_newton import GaussNewton

NEWTON = TextualInversionConfig.presets["gauss-newton"] | {"zo_rank": 6, "zo_n": 3}


def linear(size=6, outputs=40, seed=0):
    """A model p(u) = A u + b and a target that it can nearly reach."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(outputs, size, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(outputs, generator=generator, dtype=torch.float64)
    return a, noise


def test_one_full_step_solves_a_linear_model():
    a, noise = linear()
    newton = GaussNewton(6, n=6, eps=1e-3, damping=1e-9)
    u = torch.zeros(6, dtype=torch.float64)
    newton.update_(u, newton.probes(u, 0) @ a.T + noise, torch.ones(40).double(), 0)
    want = torch.linalg.lstsq(a, 1 - noise).solution
    torch.testing.assert_close(u, want, atol=1e-6, rtol=1e-6)


def test_steps_add_up_as_ridge_regression():
    """With all directions measured, steps on different data end at the solution of all of them."""
    newton, u = GaussNewton(6, n=6, eps=1e-3, damping=3.0), torch.zeros(6, dtype=torch.float64)
    gram, right = 3.0 * torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for step in range(5):
        a, noise = linear(seed=step)
        predicted = newton.probes(u, step) @ a.T + noise
        weight = 1 / (predicted[0] - 1).square().sum()
        gram, right = gram + weight * a.T @ a, right + weight * a.T @ (1 - noise)
        newton.update_(u, predicted, torch.ones(40).double(), step)
    torch.testing.assert_close(u, torch.linalg.solve(gram, right), atol=1e-6, rtol=1e-6)


def test_few_directions_come_as_near():
    a, noise = linear()
    newton, u = GaussNewton(6, n=2, eps=1e-3, damping=1e-3), torch.zeros(6, dtype=torch.float64)
    for step in range(60):
        newton.update_(u, newton.probes(u, step) @ a.T + noise, torch.ones(40).double(), step)
    best = torch.linalg.lstsq(a, 1 - noise).solution
    assert (u - best).norm() < 0.05 * best.norm()


@pytest.mark.parametrize("n", [1, 3, 4, 7])
def test_directions_of_a_rotation_are_orthonormal(n):
    newton = GaussNewton(7, n=n, eps=1.0, damping=1.0, seed=5)
    blocks = 7 // n
    z = torch.cat([newton.directions(step) for step in range(blocks)])
    torch.testing.assert_close(z @ z.T, torch.eye(blocks * n).double(), atol=1e-6, rtol=0)
    assert not newton.directions(0).equal(newton.directions(blocks))
    assert newton.directions(2).equal(
        GaussNewton(7, n=n, eps=1.0, damping=1.0, seed=5).directions(2)
    )


def test_probes_keep_the_shape_of_the_token():
    u = torch.randn(2, 4)
    probes = GaussNewton(8, n=3, eps=0.5, damping=1.0).probes(u, 0)
    assert probes.shape == (4, 2, 4) and probes[0].equal(u)
    assert (probes[1:] - u).flatten(1).norm(dim=1) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "arguments", [{"n": 0}, {"n": 9}, {"eps": 0.0}, {"damping": -1.0}, {"eps": float("nan")}]
)
def test_out_of_range(arguments):
    with pytest.raises(ValueError, match="GaussNewton: "):
        GaussNewton(8, **{"n": 2, "eps": 1.0, "damping": 1.0} | arguments)


def test_a_token_learns(options, make_method):
    method = make_method(options(num_vectors=2, **NEWTON | {"max_train_steps": 8}))
    batch = method.batches.draw(torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = method._losses(method.theta[None], batch)
    start = method.theta.clone()
    method.draw = lambda: batch
    steps = list(method.run())
    with torch.inference_mode():
        after = method._losses(method.theta[None], batch)
    assert after < before and not method.theta.equal(start)
    assert steps[-1].forwards == 8 * 4 and method.metadata()["persona.method"] == "gauss-newton"
    assert method.metadata()["ss_learning_rate"] == "None"


def test_a_loss_that_is_not_finite_changes_nothing(options, make_method):
    method = make_method(options(**NEWTON))
    before = method.theta.clone(), method.newton.precision.clone()
    batch = method.draw()
    batch.x_t[:] = float("nan")
    method.draw = lambda: batch
    assert method.step().rejected == 1
    assert method.theta.equal(before[0]) and method.newton.precision.equal(before[1])


def test_the_moment_is_that_of_autograd(options, make_method):
    method = make_method(options(num_vectors=2, base_precision="as-loaded"))
    prompts = torch.cat(method.batches.ids)
    found = encoder_moment(method.family, method.hook, prompts, eps=1e-3)
    want = torch.zeros_like(found)
    distinct = list({tuple(p.tolist()): p for p in prompts}.values())[:2]
    for prompt in distinct:

        def hidden(rows, prompt=prompt):
            with method.hook.copies(rows[None]):
                return method.family.encode_tokens(prompt[None]).flatten()

        jacobian = torch.autograd.functional.jacobian(
            hidden, method.theta, vectorize=True
        ).double()  # [T * hidden, R, d]
        want += torch.einsum("ori,orj->ij", jacobian, jacobian)
    torch.testing.assert_close(found, want / len(distinct), rtol=0.02, atol=0.02 * want.max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zo_n": 7}, "zo_n: must be at most the 6 coordinates of the token"),
        ({"zo_estimator": "two_sided"}, "zo_estimator: must be one_sided where optimizer is gauss"),
        ({"zo_damping": 0.0}, "zo_damping: must be positive"),
    ],
)
def test_bad_options(options, make_method, changes, message):
    with pytest.raises(UserError, match=message):
        make_method(options(**NEWTON | changes))
