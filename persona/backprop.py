# SPDX-License-Identifier: Apache-2.0
"""A step of AdamW on gradients of backpropagation, one loss's graph in memory at a time."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from persona.config_backprop import BackpropConfig
from persona.optimizer_state import flatten, restore


class Backprop:
    """AdamW (arXiv 1711.05101) with the options of ``config``, gradients clipped to a norm.

    Args:
        parameters: what learns, fp32; a gradient and two moments of each are kept.
        config: learning_rate, betas, epsilon, weight decay and max_grad_norm.
    """

    def __init__(self, parameters: Iterable[Tensor], config: BackpropConfig) -> None:
        self.parameters, self.max_norm = list(parameters), config.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
            foreach=False,  # all parameters at once would need temporaries of their size
        )

    @torch.enable_grad()
    def step(self, *losses: Callable[[], Tensor]) -> tuple[float, bool]:
        """One update by the sum of ``losses``, each evaluated and derived before the next.

        Returns:
            The sum, and whether it and its gradient were finite; otherwise nothing has changed.
        """
        total = 0.0
        for evaluate in losses:
            loss = evaluate()
            total += loss.item()
            if not math.isfinite(total):
                break
            loss.backward()
            del loss
        accepted = math.isfinite(total) and self._clip()
        if accepted:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, accepted

    def _clip(self) -> bool:
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm, foreach=False)
        return math.isfinite(norm)

    def state_dict(self) -> dict[str, Tensor]:
        return flatten(self.optimizer)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        restore(self.optimizer, state)
