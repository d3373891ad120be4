# SPDX-License-Identifier: Apache-2.0
"""Gauss-Newton by forward passes: what the perturbed predictions tell beside their losses.

A loss is one number of a forward pass that predicted thousands. With p(u) the UNet's prediction at
coordinates u and r = p(u) - target, forward differences along orthonormal directions Z [n, k],

    D_j = (p(u + eps z_j) - p(u)) / eps,

give the gradient D r and, from the same passes, the curvature D D^T of the squared error there.
With few coordinates these add up over steps, as in recursive least squares (an extended Kalman
filter whose state does not drift): of P, which starts as damping * I,

    P <- P + (k / n) Z^T (D D^T / m) Z,    u <- u - P^-1 (k / n) Z^T (D r / m),

where m = sum(r^2) makes the error a share of this step's own, so that timesteps of much error do
not rule. Steps shorten by themselves as P grows: there is no learning rate. Every k // n steps use
up the directions of one random rotation. All of this is ours. It needs both: few coordinates, and
such as matter (`persona.space`); `benchmarks.fewer_forwards` has either without the other.
"""

from functools import lru_cache

import torch
from torch import Tensor

from zo_kernels.rng import noise


class GaussNewton:
    """The estimator and its state, P.

    Args:
        size: k, how many coordinates there are.
        n: directions a step, at most k.
        eps: radius of the probes, in units of the coordinates.
        damping: of P at the start, in share of the loss / coordinate^2.
        seed: of the rotations.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, size: int, *, n: int, eps: float, damping: float, seed: int = 0) -> None:
        if not 1 <= n <= size:
            raise ValueError(f"GaussNewton: n must be from 1 to {size}, got {n}; 8 is usual")
        if not (eps > 0 and damping > 0):
            raise ValueError(
                f"GaussNewton: eps and damping must be positive, got {eps} and {damping}"
            )
        self.size, self.n, self.eps, self.seed = size, n, eps, seed
        self.precision = damping * torch.eye(size, dtype=torch.float64)

    def directions(self, step: int) -> Tensor:
        """Z of a step: fp64 [n, k], orthonormal rows."""
        rotation, block = divmod(step, self.size // self.n)
        return _rotation(self.size, self.seed, rotation)[block * self.n :][: self.n]

    def probes(self, u: Tensor, step: int) -> Tensor:
        """u and u + eps z_j: [n + 1, *u.shape] in its dtype."""
        moved = self.eps * self.directions(step).to(u.dtype).unflatten(1, u.shape)
        return torch.cat([u[None], u + moved])

    def update_(self, u: Tensor, predicted: Tensor, target: Tensor, step: int) -> None:
        """Move u, and add to P, by the predictions of the `probes` of this step.

        Args:
            predicted: [n + 1, *target.shape], finite.
            target: what they should be.
        """
        directions = self.directions(step)
        base = predicted[0].flatten().double()
        change = (predicted[1:].flatten(1).double() - base) / self.eps  # D, [n, N]
        residual = base - target.flatten().double()
        share = self.size / self.n / residual.square().sum().clamp_min(1e-30)
        self.precision += share * directions.T @ (change @ change.T) @ directions
        gradient = share * directions.T @ (change @ residual)
        u -= torch.linalg.solve(self.precision, gradient).to(u.dtype).view_as(u)


@lru_cache(maxsize=1)  # the probes and the update of a step need the same, as do the next steps
def _rotation(size: int, seed: int, index: int) -> Tensor:
    """Random orthonormal rows: fp64 [size, size]."""
    z = noise((size, size), seed=seed, draw=index, stream=0).double()
    return torch.linalg.qr(z).Q.T
