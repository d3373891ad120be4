# SPDX-License-Identifier: Apache-2.0
"""Gradient estimates from losses alone: two-sided (SPSA) and one-sided (RGE), n random directions.

With directions z_1 .. z_n (zero mean, unit variance, independent elements) the estimate is always

    g_hat = sum_j c_j z_j

and an estimator is the rule that turns losses L(.) into the coefficients c_j:

    two_sided   c_j = (L(theta + eps z_j) - L(theta - eps z_j)) / (2 eps n)      2n losses
    one_sided   c_j = (L(theta + eps z_j) - L(theta)) / (eps n)                  n + 1 losses
    one_point   c_j = (L(theta + eps z_j) - L(theta + eps z_{j+1})) / (eps n)    n + 1 losses

Two-sided: Spall 1992; MeZO (arXiv 2305.17333), Definition 1. One-sided: ZOODiP (arXiv 2503.14868),
equation 3. One-point, which `Estimator` alone has: equation S12 there, with the sign that makes it
an estimate of the gradient (our reading: as printed it is one of the negative gradient); n + 1
directions, of which the last is only compared with. Losses are always ordered as `schedule` lists
their evaluations, whether they come one by one (an optimizer's closure) or as one tensor (all
perturbed copies in one batched forward).

Two ways in. A set of parameters too large to copy is perturbed in place by `zo_kernels.optim`. For
a small tensor, such as the embedding of a token, `Estimator` makes the copies and the estimate:

    estimator = Estimator(n=2, eps=1e-3, estimator="one_sided", seed=0)
    losses = evaluate(estimator.probes(theta, draw=2 * step))           # [Q, *theta.shape] -> [Q]
    gradient = estimator.gradient(losses, like=theta, draw=2 * step)    # theta.shape
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from zo_kernels.ops import add_noise_
from zo_kernels.rng import KINDS

ESTIMATORS = ("two_sided", "one_sided")  # of the optimizers
ALL = (*ESTIMATORS, "one_point")  # of `Estimator`


def schedule(estimator: str, n: int) -> list[tuple[int, float]]:
    """The evaluations of a step, in order, as (direction j, sign): each is L(theta + sign eps z_j).

    `two_sided`, 2n of them: +z_0, -z_0, +z_1, -z_1, ...
    `one_sided`, n + 1: theta itself (sign 0), +z_0, +z_1, ...
    `one_point`, n + 1: +z_0, +z_1, ... +z_n

    Raises:
        ValueError: unknown estimator, or n < 1.
    """
    check_directions("schedule", n=n, estimator=estimator, known=ALL)
    if estimator == "two_sided":
        return [(j, sign) for j in range(n) for sign in (1.0, -1.0)]
    if estimator == "one_point":
        return [(j, 1.0) for j in range(n + 1)]
    return [(0, 0.0)] + [(j, 1.0) for j in range(n)]


def two_sided(losses: Tensor | Sequence[float], eps: float) -> list[float]:
    """Coefficients c_j = (L(theta + eps z_j) - L(theta - eps z_j)) / (2 eps n), in fp64.

    Args:
        losses: [2n], ordered +z_0, -z_0, +z_1, -z_1, ...; a tensor is read back once.
        eps: radius of the probes, in units of theta; the coefficients are in loss / theta.

    Raises:
        ValueError: the number of losses is not even, or is 0.
    """
    values = _floats(losses)
    if not values or len(values) % 2:
        raise ValueError(
            f"two_sided: losses must be 2n values, got {len(values)}; "
            "evaluate +eps and -eps for each direction"
        )
    n = len(values) // 2
    pairs = zip(values[::2], values[1::2], strict=True)
    return [(plus - minus) / (2 * eps * n) for plus, minus in pairs]


def one_sided(losses: Tensor | Sequence[float], eps: float) -> list[float]:
    """Coefficients c_j = (L(theta + eps z_j) - L(theta)) / (eps n), in fp64 (ZOODiP, equation 3).

    Args:
        losses: [n + 1], ordered theta, +z_0, +z_1, ...; a tensor is read back once.
        eps: radius of the probes, in units of theta; the coefficients are in loss / theta.

    Raises:
        ValueError: fewer than two losses.
    """
    base, *perturbed = _at_least_two(
        "one_sided", losses, "evaluate theta first, then each direction"
    )
    return [(loss - base) / (eps * len(perturbed)) for loss in perturbed]


def one_point(losses: Tensor | Sequence[float], eps: float) -> list[float]:
    """Coefficients c_j = (L(theta + eps z_j) - L(theta + eps z_{j+1})) / (eps n), in fp64.

    The direction that each is compared with adds to the variance and nothing to the mean.

    Args:
        losses: [n + 1], ordered +z_0, +z_1, ...; a tensor is read back once.
        eps: radius of the probes, in units of theta; the coefficients are in loss / theta.

    Raises:
        ValueError: fewer than two losses.
    """
    values = _at_least_two("one_point", losses, "evaluate every direction and one more")
    n = len(values) - 1
    return [(loss - other) / (eps * n) for loss, other in pairwise(values)]


def _at_least_two(name: str, losses: Tensor | Sequence[float], advice: str) -> list[float]:
    values = _floats(losses)
    if len(values) < 2:
        raise ValueError(f"{name}: losses must be n + 1 >= 2 values, got {len(values)}; {advice}")
    return values


_RULES = {"two_sided": two_sided, "one_sided": one_sided, "one_point": one_point}


def coefficients(losses: Tensor | Sequence[float], *, estimator: str, eps: float) -> list[float]:
    """The rule named `estimator` applied to `losses`."""
    check_directions("coefficients", estimator=estimator, known=ALL)
    return _RULES[estimator](losses, eps)


def spsa_norm(dim: int, n: int) -> float:
    """sqrt((dim + n - 1) / n): root mean square of |g_hat| / |gradient| for n directions in R^dim.

    Exact for Rademacher directions, and MeZO's Lemma 2. ZOODiP's released code divides its estimate
    by it, its paper does not; it matters because Adam's `adam_eps` is absolute.
    """
    return math.sqrt((dim + n - 1) / n)


@dataclass(frozen=True)
class Estimator:
    """n directions around a small tensor: its perturbed copies, and the estimate from their losses.

    Nothing is kept between the two calls. `draw` names the directions: direction j of a call is
    draw + j, so step k passes draw = directions k. `stream` names the tensor: those probed
    together, such as the tokens of two text encoders, each take a stream of their own.

    Args:
        n: number of directions.
        eps: radius of the probes, in units of theta.
        estimator: `two_sided` (2n losses), `one_sided` or `one_point` (n + 1 losses).
        kind: distribution of the directions, `normal` or `rademacher`.
        seed: key of the noise, a signed 64-bit integer; the same for the whole run.

    Raises:
        ValueError: an argument out of its bound.
    """

    n: int = 1
    eps: float = 1e-3
    estimator: str = "two_sided"
    kind: str = "normal"
    seed: int = 0

    def __post_init__(self) -> None:
        check_directions(
            "Estimator",
            n=self.n,
            estimator=self.estimator,
            kind=self.kind,
            seed=self.seed,
            known=ALL,
        )
        check(0 < self.eps < math.inf, "Estimator", "eps", "finite and > 0", self.eps, "use 1e-3")

    @property
    def evaluations(self) -> int:
        """Q, the number of forward passes of a step: 2n or n + 1."""
        return len(schedule(self.estimator, self.n))

    @property
    def directions(self) -> int:
        """How many directions a step draws: n, of one_point n + 1."""
        return self.n + (self.estimator == "one_point")

    def probes(self, theta: Tensor, *, draw: int, stream: int = 0) -> Tensor:
        """Perturbed copies of theta, [Q, *theta.shape] in its dtype, ordered as `schedule` says.

        Each is theta + sign eps z_j, rounded once; theta is not written.
        """
        with torch.no_grad():
            copies = torch.stack([theta.detach()] * self.evaluations)
            for copy, (j, sign) in zip(copies, schedule(self.estimator, self.n), strict=True):
                if sign:
                    add_noise_(
                        [copy], [stream], self.seed, [draw + j], [sign * self.eps], kind=self.kind
                    )
        return copies

    def gradient(
        self,
        losses: Tensor | Sequence[float],
        *,
        like: Tensor,
        draw: int,
        stream: int = 0,
        norm_dim: int | None = None,
    ) -> Tensor:
        """The estimate g_hat, fp32, with the shape and device of `like`, in loss / theta.

        Args:
            losses: [Q], of the copies that `probes` returned for the same draw, in the same order.
            like: theta, or any tensor of its shape on its device.
            draw, stream: those given to `probes`.
            norm_dim: divide by `spsa_norm(norm_dim, n)`, as ZOODiP's released code does with the
                dimension that its subspace leaves; None: as in its paper.

        Raises:
            ValueError: the number of losses is not Q.
        """
        if len(losses) != self.evaluations:
            raise ValueError(
                f"Estimator.gradient: losses must be {self.evaluations} values, got {len(losses)}; "
                "pass one loss for each copy that probes() returned"
            )
        scale = 1.0 if norm_dim is None else 1.0 / spsa_norm(norm_dim, self.n)
        coeffs = [c * scale for c in coefficients(losses, estimator=self.estimator, eps=self.eps)]
        return combine(coeffs, like=like, seed=self.seed, draw=draw, stream=stream, kind=self.kind)


def combine(
    coeffs: Sequence[float], *, like: Tensor, seed: int, draw: int, stream: int, kind: str
) -> Tensor:
    """sum_j coeffs[j] z(seed, draw + j, stream, .): fp32, with the shape and device of `like`."""
    total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    draws = [draw + j for j in range(len(coeffs))]
    add_noise_([total], [stream], seed, draws, coeffs, kind=kind)
    return total


def check(ok: bool, owner: str, name: str, requirement: str, value: object, advice: str) -> None:
    """Raises ValueError in the package's error grammar unless `ok`."""
    if not ok:
        raise ValueError(f"{owner}: {name} must be {requirement}, got {value!r}; {advice}")


def check_directions(
    owner: str,
    *,
    n: int = 1,
    estimator: str = "two_sided",
    kind: str = "normal",
    seed: int = 0,
    known: tuple[str, ...] = ESTIMATORS,
) -> None:
    """Checks what Estimator and the optimizers have in common; `owner` opens the message."""
    check(_is_int(n) and n >= 1, owner, "n", "an integer >= 1", n, "n counts directions")
    check(estimator in known, owner, "estimator", f"one of {known}", estimator, "choose one")
    check(kind in KINDS, owner, "kind", f"one of {KINDS}", kind, "choose one of them")
    fits = _is_int(seed) and -(2**63) <= seed < 2**63
    check(fits, owner, "seed", "a signed 64-bit integer", seed, "keep one for the whole run")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _floats(losses: Tensor | Sequence[float]) -> list[float]:
    return losses.flatten().tolist() if isinstance(losses, Tensor) else [float(x) for x in losses]
