# SPDX-License-Identifier: Apache-2.0
"""Each optimizer against a twin that follows its paper line by line, in fp64, with stored z."""

import pytest
import torch

from zo_kernels.estimators import ESTIMATORS, KINDS, Estimator
from zo_kernels.optim import ZOSGD, ZOAdam, adam_update_
from zo_kernels.rng import noise


def loss_of(tensors):
    a, b = tensors
    return (a.double() - 1).square().sum() + (a.double().sum() * b.double()).cos().mean()


class Reference:
    """MeZO, Algorithm 1 (n-SPSA), and ZOODiP, equation 3; every z is a stored tensor."""

    def __init__(self, thetas, *, lr, eps, n, estimator, kind, seed, weight_decay):
        self.thetas = [theta.double() for theta in thetas]
        self.lr, self.eps, self.n, self.kind, self.seed = lr, eps, n, kind, seed
        self.estimator, self.weight_decay = estimator, weight_decay
        self.t = 0
        self.m = [torch.zeros_like(theta) for theta in self.thetas]
        self.v = [torch.zeros_like(theta) for theta in self.thetas]

    def gradient(self):
        gradient = [torch.zeros_like(theta) for theta in self.thetas]
        for draw in range(self.t * self.n, (self.t + 1) * self.n):
            z = [
                noise(t.numel(), seed=self.seed, draw=draw, stream=s, kind=self.kind).view_as(t)
                for s, t in enumerate(self.thetas)
            ]
            plus = loss_of([t + self.eps * e for t, e in zip(self.thetas, z, strict=True)])
            if self.estimator == "two_sided":
                minus = loss_of([t - self.eps * e for t, e in zip(self.thetas, z, strict=True)])
                projected = (plus - minus) / (2 * self.eps)
            else:
                projected = (plus - loss_of(self.thetas)) / self.eps
            gradient = [g + projected * e / self.n for g, e in zip(gradient, z, strict=True)]
        return gradient


class ReferenceSGD(Reference):
    def __init__(self, *args, momentum=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.momentum = momentum

    def step(self):
        for i, g in enumerate(self.gradient()):
            self.m[i] = self.momentum * self.m[i] + g
            self.thetas[i] -= self.lr * (self.m[i] + self.weight_decay * self.thetas[i])
        self.t += 1


class ReferenceAdam(Reference):
    """Kingma and Ba, Algorithm 1; the decay is Loshchilov and Hutter's (AdamW)."""

    def __init__(self, *args, betas, adam_eps, **kwargs):
        super().__init__(*args, **kwargs)
        self.betas, self.adam_eps = betas, adam_eps

    def step(self):
        gradient = self.gradient()
        self.t += 1
        for i, g in enumerate(gradient):
            self.m[i] = self.betas[0] * self.m[i] + (1 - self.betas[0]) * g
            self.v[i] = self.betas[1] * self.v[i] + (1 - self.betas[1]) * g**2
            m_hat = self.m[i] / (1 - self.betas[0] ** self.t)
            v_hat = self.v[i] / (1 - self.betas[1] ** self.t)
            update = m_hat / (v_hat.sqrt() + self.adam_eps) + self.weight_decay * self.thetas[i]
            self.thetas[i] -= self.lr * update


CASES = {
    "sgd": (ZOSGD, ReferenceSGD, {"lr": 0.01}),
    "momentum": (ZOSGD, ReferenceSGD, {"lr": 0.005, "momentum": 0.8}),
    "adam": (ZOAdam, ReferenceAdam, {"lr": 0.02, "betas": (0.8, 0.9), "adam_eps": 1e-3}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("probe", ["snapshot", "in_place"])
def test_equals_the_paper(case, estimator, kind, probe):
    kind_of, reference, arguments = CASES[case]
    thetas = [torch.linspace(-1, 1, 5), torch.linspace(0, 1, 4).reshape(2, 2)]
    shared = {"eps": 0.01, "n": 2, "estimator": estimator, "kind": kind, "seed": 5}
    twin = reference(thetas, **arguments, **shared, weight_decay=0.1)
    params = [theta.clone().requires_grad_() for theta in thetas]
    optimizer = kind_of(params, **arguments, **shared, weight_decay=0.1, probe=probe)
    for _ in range(6):
        optimizer.step(lambda: loss_of(params))
        twin.step()
    for p, theta in zip(params, twin.thetas, strict=True):
        torch.testing.assert_close(p.detach().double(), theta, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_update_equals_torch(weight_decay):
    theta = torch.linspace(-1, 1, 7)
    ours, theirs = theta.clone(), theta.clone().requires_grad_()
    settings = {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": weight_decay}
    adam = torch.optim.AdamW([theirs], eps=1e-3, **settings)
    m, v = torch.zeros(7), torch.zeros(7)
    for step in range(1, 6):
        theirs.grad = torch.sin(torch.arange(7.0) * step)
        adam_update_(ours, theirs.grad, m, v, step, adam_eps=1e-3, **settings)
        adam.step()
    torch.testing.assert_close(ours, theirs.detach())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_copies_and_adam_update_are_the_optimizer_taken_apart(estimator):
    """The way of textual inversion: batched copies, an estimate to project, then the update."""
    settings = {"n": 2, "eps": 0.01, "estimator": estimator, "seed": 9}
    whole = torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_()
    optimizer = ZOAdam([whole], lr=0.02, **settings)
    parts, m, v = whole.detach().clone(), torch.zeros(2, 3), torch.zeros(2, 3)
    parts_estimator = Estimator(**settings)
    for step in range(5):
        optimizer.step(lambda: (whole.double() - 1).square().sum())
        copies = parts_estimator.probes(parts, draw=2 * step)
        losses = torch.stack([(copy.double() - 1).square().sum() for copy in copies])
        gradient = parts_estimator.gradient(losses, like=parts, draw=2 * step)
        adam_update_(parts, gradient, m, v, step + 1, lr=0.02)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)  # torch's root is an ulp off ours
