# SPDX-License-Identifier: Apache-2.0
"""When a step of selective optimization backpropagates: a family of probabilities.

    p(t, k) = clip(f(t / T) g(k / K), low, high)

for timestep t of T and step k of K. That the probability of BP-low falls with t, and in the course
of training, is arXiv 2507.10029's abstract; its formula was not to be had: f, g and the defaults
are ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

# f(x, centre, width) for x = t / T in [0, 1).
TIMESTEP_CURVES: dict[str, Callable[[float, float, float], float]] = {
    "logistic": lambda x, centre, width: 1 / (1 + math.exp(min((x - centre) / width, 700.0))),
    "step": lambda x, centre, width: float(x < centre),
    "linear": lambda x, centre, width: 1 - x,
    "constant": lambda x, centre, width: 1.0,
}
# g(y, end) for y = k / K in [0, 1]: from 1 to end.
PROGRESS_CURVES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda y, end: 1 - (1 - end) * y,
    "cosine": lambda y, end: end + (1 - end) * (1 + math.cos(math.pi * y)) / 2,
    "constant": lambda y, end: 1.0,
}


@dataclass(frozen=True)
class Selection:
    """The probability above.

    Attributes:
        timestep, progress: keys of TIMESTEP_CURVES and PROGRESS_CURVES.
        centre, width: of f, as shares of T; `logistic` is 1/2 at the centre.
        end: g of the last step.
        low, high: bounds of p.
    """

    timestep: str = "logistic"
    progress: str = "linear"
    centre: float = 0.5
    width: float = 0.1
    end: float = 0.2
    low: float = 0.0
    high: float = 1.0

    def probability(self, t: float, progress: float) -> float:
        """p for t / T and k / K."""
        f = TIMESTEP_CURVES[self.timestep](t, self.centre, self.width)
        g = PROGRESS_CURVES[self.progress](progress, self.end)
        return min(max(f * g, self.low), self.high)
