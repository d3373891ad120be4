# SPDX-License-Identifier: Apache-2.0
"""Samplers of the diffusion timestep: uniform, and ZOODiP's partial uniform window."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """t ~ U{low, ..., high - 1}: PUTS (ZOODiP, arXiv 2503.14868, equation 9), U(T_L, T_U).

    low, high: timesteps of the scheduler, 0 <= low < high <= number of training timesteps. The
    paper takes (500, 900) for Stable Diffusion 1.5; (0, 1000) is the uniform sampler.

    Raises:
        ValueError: the window is empty or starts below 0.
    """

    low: int = 500
    high: int = 900

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(
                f"Window: low and high must be 0 <= low < high, got {self.low} and {self.high}; "
                "the paper's window is 500 to 900"
            )

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps, int64 [count]."""
        return torch.randint(self.low, self.high, (count,), generator=generator)
