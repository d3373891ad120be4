# SPDX-License-Identifier: Apache-2.0
"""Options that scale the coefficients of an estimate; none costs a forward pass or memory.

With d_j = n c_j, the directional derivatives:

| option        | effect                                                         | source          |
|---------------|----------------------------------------------------------------|-----------------|
| `clip`        | d_j <- min(max(d_j, -clip), clip)                              | QZO 2505.13430  |
| `normalize`   | c_j <- c_j eps / std of the losses of the perturbed weights    | FZOO, ICLR 2026 |
| `scalar_beta` | v <- beta v + (1 - beta) mean_j d_j^2,  c_j <- c_j / sqrt(v)   | MEAZO 2605.03869|

v is divided by 1 - beta^t, as in Adam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from zo_kernels.estimators import check

SCALAR_EPS = 1e-12  # keeps a flat loss from dividing by zero


class Scaling(NamedTuple):
    """The options of one optimizer, checked."""

    clip: float | None
    normalize: bool
    scalar_beta: float | None

    @classmethod
    def checked(
        cls, owner: str, clip: Any, normalize: Any, scalar_beta: Any, estimator: str, n: int
    ) -> Scaling:
        fits = clip is None or (isinstance(clip, (int, float)) and 0 < clip < math.inf)
        check(fits, owner, "clip", "None, or finite and > 0", clip, "it bounds |d_j|, in loss / z")
        enough = not normalize or estimator == "two_sided" or n >= 2
        need = "False with one direction of one_sided, whose spread is unknown"
        check(enough, owner, "normalize", need, normalize, "use n >= 2")
        fits = scalar_beta is None or (isinstance(scalar_beta, float) and 0 <= scalar_beta < 1)
        check(fits, owner, "scalar_beta", "None, or in [0, 1)", scalar_beta, "0.99 is common")
        both = normalize and scalar_beta is not None
        advice = "either of them makes a step independent of the unit of the loss"
        check(not both, owner, "scalar_beta", "None with normalize", scalar_beta, advice)
        return cls(None if clip is None else float(clip), bool(normalize), scalar_beta)

    def apply(
        self, coeffs: Sequence[float], losses: Sequence[float], group: dict[str, Any]
    ) -> tuple[list[float], int]:
        """The scaled coefficients, and how many were clipped. Losses are those at theta +- eps z.

        group: its eps is read; its `scalar_sq` and `scalar_steps` are the state of `scalar_beta`.
        """
        n = len(coeffs)
        slopes = [c * n for c in coeffs]
        clipped = 0
        if self.clip is not None:
            clipped = sum(abs(d) > self.clip for d in slopes)
            slopes = [min(max(d, -self.clip), self.clip) for d in slopes]
        factor = 1.0 / n
        if self.normalize:
            factor *= group["eps"] / (_spread(losses) + SCALAR_EPS)
        if self.scalar_beta is not None:
            beta, steps = self.scalar_beta, group.get("scalar_steps", 0) + 1
            square = sum(d * d for d in slopes) / n
            moment = beta * group.get("scalar_sq", 0.0) + (1 - beta) * square
            group["scalar_sq"], group["scalar_steps"] = moment, steps
            factor /= math.sqrt(moment / (1 - beta**steps)) + SCALAR_EPS
        return [d * factor for d in slopes], clipped


def _spread(losses: Sequence[float]) -> float:
    mean = sum(losses) / len(losses)
    return math.sqrt(sum((x - mean) ** 2 for x in losses) / (len(losses) - 1))
