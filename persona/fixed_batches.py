# SPDX-License-Identifier: Apache-2.0
"""A finite training set of (picture, noise, timestep): the loss becomes a fixed function.

Fresh draws make every step's loss another function; with a fixed set each of its members comes as
often as every other, and the mean over all is deterministic. This is ours, not ZOODiP's.
"""

import torch

from persona.batches import Batch, Batches


class FixedBatches:
    """``count`` members drawn once, their timesteps spread evenly over the window.

    A step sees the next of them in an order that changes each time all have been seen; it depends
    on the number of the step alone, so that a resumed run goes on as it would have.

    Args:
        batches: draws the members; its train_batch_size is what a step sees.
        count: how many, at least 1.
        seed: of the members and of the order.
    """

    def __init__(self, batches: Batches, count: int, seed: int) -> None:
        self.count, self.size, self.seed = count, batches.config.train_batch_size, seed
        generator = torch.Generator().manual_seed(seed)
        low, high = batches.window.low, batches.window.high
        share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        t = (low + share * (high - low)).long().clamp_max(high - 1)
        self.members = batches.draw(generator, t)

    def at(self, step: int) -> Batch:
        """What step ``step``, counted from 0, sees."""
        first = step * self.size
        chosen = torch.tensor([self._member(first + i) for i in range(self.size)])
        return Batch(*(value[chosen.to(value.device)] for value in self.members))

    def _member(self, number: int) -> int:
        turn, place = divmod(number, self.count)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(turn % 16 + 1):  # sixteen orders in turn
            order = torch.randperm(self.count, generator=generator)
        return int(order[place])
