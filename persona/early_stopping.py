# SPDX-License-Identifier: Apache-2.0
"""When to end a run: a loss without noise of its own has stopped falling.

The loss of a step is of other pictures, noise and timesteps each time, and tells little. Here the
same ones are seen at every check (`persona.fixed_batches`). This is ours, not ZOODiP's.
"""

import math

import torch
from torch import Tensor

DRAWS = 32  # of picture, noise and timestep, at a check


class EarlyStopping:
    """Remembers the best token, and for how long there was no better one.

    Args:
        patience: checks in a row without a better token that end the run; 0: there are no checks.
        every: steps between two checks.
        token: [R, d], only for its shape.

    Attributes:
        checks: how many there were.
        best: the lowest loss so far.
        token: that had it.
    """

    def __init__(self, patience: int, every: int, token: Tensor) -> None:
        self.patience, self.every = patience, every
        self.checks = self.waited = 0
        self.best, self.token = math.inf, token.clone()

    def is_due(self, steps: int) -> bool:
        """Whether a check follows the last of ``steps`` steps."""
        return self.patience > 0 and steps % self.every == 0

    @property
    def is_over(self) -> bool:
        return 0 < self.patience <= self.waited

    def check(self, loss: float, token: Tensor) -> None:
        self.checks += 1
        self.waited += 1
        if loss < self.best:
            self.best, self.waited = loss, 0
            self.token.copy_(token)

    def state_dict(self) -> dict[str, Tensor]:
        counts = torch.tensor([self.checks, self.waited])
        best = torch.tensor(self.best, dtype=torch.float64)
        return {"counts": counts, "best": best, "token": self.token}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.checks, self.waited = state["counts"].tolist()
        self.best = state["best"].item()
        self.token.copy_(state["token"])
