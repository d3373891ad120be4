# SPDX-License-Identifier: Apache-2.0
"""What a personalization method is to the training loop."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

import zo_kernels
from persona.config import RunConfig
from persona.data import Example
from persona.families import StableDiffusion


@dataclass(frozen=True)
class Step:
    """What one step reports: finished steps, loss of its first evaluation, forwards so far, how
    many steps were rejected so far; and what else the method has for the metrics."""

    step: int
    loss: float
    forwards: int
    rejected: int
    more: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A model that learns: made from a frozen model, options and pictures; all its randomness and
    all that training changes is in its state.

    Attributes:
        steps: finished steps, rejected ones among them.
        rejected: steps whose loss was not finite; they changed nothing.
        forwards: evaluations of the UNet so far, each of one batch of pictures.

    Raises:
        UserError: the constructor, where an option does not fit the model.
    """

    family: StableDiffusion
    steps: int
    rejected: int

    def __init__(self, family: StableDiffusion, config: Any, examples: list[Example]) -> None: ...

    @property
    def forwards(self) -> int: ...

    def run(self) -> Iterator[Step]:
        """Train up to ``config.max_train_steps``; yields after every step, with the state whole."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that a bit-identical resume needs."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def save(self, folder: Path) -> Path:
        """Write the result that other programs load; returns its path."""
        ...

    def metadata(self) -> dict[str, str]:
        """What the header of the result says of the run."""
        ...


def metadata(method: Method, config: RunConfig, name: str, pictures: int) -> dict[str, str]:
    """`Method.metadata` of the method called ``name``, in kohya's keys where there are such."""
    return {
        "ss_sd_model_name": Path(config.pretrained_model_name_or_path).name,
        "ss_seed": str(config.seed),
        "ss_steps": str(method.steps),
        "ss_learning_rate": str(config.rate),
        "ss_num_train_images": str(pictures),
        "persona.method": name,
        "persona.base_precision": config.base_precision,
        "persona.rejected": str(method.rejected),
        "persona.forwards": str(method.forwards),
        "persona.version": zo_kernels.__version__,
    }
