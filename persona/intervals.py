# SPDX-License-Identifier: Apache-2.0
"""Which set of scales serves which timestep."""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from persona.errors import UserError

_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True)
class Intervals:
    """Disjoint ranges of timesteps, each with the set that serves it; no set where none covers t.

    Attributes:
        ranges: (low, high) each, high exclusive.
        sets: for each range the number of its set, from 0; ranges may share one.
    """

    ranges: tuple[tuple[int, int], ...]
    sets: tuple[int, ...]

    @classmethod
    def uniform(cls, count: int, limit: int) -> Self:
        """Set i serves t with floor(t count / limit) = i: I_i = [i T / N, (i + 1) T / N) of TuneQDM
        (arXiv 2401.04339 v2) and, as we read v1's abstract, of S2(N).

        Args:
            limit: T, number of timesteps of the model.
        """
        edges = [-(-i * limit // count) for i in range(count + 1)]
        return cls(tuple(pairwise(edges)), tuple(range(count)))

    @classmethod
    def selected(cls, text: str) -> Self:
        """One set for all of "LOW-HIGH,LOW-HIGH", high exclusive.

        Raises:
            UserError: the text is another, or a range is empty or meets the one before it.
        """
        found = [_RANGE.fullmatch(part.strip()) for part in text.split(",")]
        ranges = [(int(match[1]), int(match[2])) for match in found if match]
        ends = [edge for pair in ranges for edge in pair]
        if None in found or any(low >= high for low, high in ranges) or ends != sorted(ends):
            raise UserError(
                f"intervals: must be rising ranges such as 0-250,500-1000, got {text!r}; the upper "
                "end is exclusive"
            )
        return cls(tuple(ranges), (0,) * len(ranges))

    @property
    def count(self) -> int:
        """How many sets there are."""
        return max(self.sets) + 1

    def of(self, t: int) -> int | None:
        """The set that serves timestep t, or None."""
        for (low, high), number in zip(self.ranges, self.sets, strict=True):
            if low <= t < high:
                return number
        return None

    def groups(self, t: Tensor) -> dict[int | None, Tensor]:
        """Set -> indices of the members of a batch that it serves; timesteps are [B]."""
        members: dict[int | None, list[int]] = {}
        for index, value in enumerate(t.tolist()):
            members.setdefault(self.of(int(value)), []).append(index)
        return {number: torch.tensor(indices) for number, indices in members.items()}

    def sample(self, count: int, low: int, high: int, generator: torch.Generator) -> Tensor:
        """Timesteps [count], uniform over what the ranges cover of [low, high).

        Raises:
            UserError: that is nothing.
        """
        steps = torch.tensor([t for t in range(low, high) if self.of(t) is not None])
        if not len(steps):
            raise UserError(
                f"intervals: must cover timesteps of {low} to {high}, got "
                f"{', '.join(f'{a}-{b}' for a, b in self.ranges)}; widen them or the window"
            )
        return steps[torch.randint(len(steps), (count,), generator=generator)]
