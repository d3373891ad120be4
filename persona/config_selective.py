# SPDX-License-Identifier: Apache-2.0
"""Options of selective optimization."""

from dataclasses import dataclass
from typing import ClassVar

from persona.config_backprop import LoraConfig
from persona.errors import UserError
from persona.options import option
from persona.selection import PROGRESS_CURVES, TIMESTEP_CURVES

# Learning rates of backpropagation and of zeroth order, for what learns; of scales, relative to
# what they were. By the denoising loss of the shipped model after 512 pictures.
RATES = {"lora": (1e-3, 0.1), "scales": (2e-3, 0.1)}


@dataclass(frozen=True)
class SelectiveConfig(LoraConfig):
    """Selective optimization (arXiv 2507.10029): each step either backpropagates at low resolution
    (BP-low) or probes by forward passes at high resolution (ZO-high).

    The paper's formula and hyperparameters were not to be had; all defaults are ours.

    Raises:
        UserError: a value is out of range, or options contradict each other.
    """

    command: ClassVar[str] = "selective"

    trainable: str = option(
        "lora", "what learns: LoRA matrices, or the scales of integers", choices=("lora", "scales")
    )
    strategy: str = option(
        "adaptive",
        "adaptive: the probability by the curves; constant: bp_share; two-phase: bp-low for the "
        "first bp_share of the steps, then zo-high; or one kind alone",
        choices=("adaptive", "constant", "two-phase", "bp-low", "bp-high", "zo-high"),
    )
    resolution: int = option(
        0, "high resolution, pixels a side; 0: the model's own", "high_resolution", at_least=0
    )
    low_resolution: int = option(
        0, "low resolution, pixels a side; 0: half of the high one", at_least=0
    )
    timestep_curve: str = option(
        "logistic", "how BP-low falls with the timestep", choices=tuple(TIMESTEP_CURVES)
    )
    timestep_center: float = option(0.5, "where logistic and step fall, as a share of T")
    timestep_width: float = option(0.1, "of logistic, as a share of T", positive=True)
    progress_curve: str = option(
        "linear", "how BP-low falls in the course of training", choices=tuple(PROGRESS_CURVES)
    )
    progress_end: float = option(0.2, "to which share of its start", at_least=0)
    min_probability: float = option(0.0, "of BP-low in a step (adaptive)", at_least=0)
    max_probability: float = option(1.0, "of BP-low in a step (adaptive)", at_least=0)
    bp_share: float = option(0.5, "of constant and two-phase", at_least=0)
    # The probability depends on how far training is: a resumed run has as many steps.
    max_train_steps: int = option(1000, "steps", at_least=1)
    learning_rate: float = option(
        0.0, "of AdamW (BP-low); 0: 1e-3 of lora, 2e-3 of scales", at_least=0
    )
    zo_learning_rate: float = option(0.0, "of ZOSGD (ZO-high); 0: 0.1 of either", at_least=0)
    zo_eps: float = option(3e-2, "probe radius, in units of what trains", "mu", positive=True)
    zo_n: int = option(1, "random directions of a ZO-high step, two forwards each", "n", at_least=1)

    def __post_init__(self) -> None:
        for name, rate in zip(
            ("learning_rate", "zo_learning_rate"), RATES.get(self.trainable, (0, 0)), strict=True
        ):
            object.__setattr__(self, name, getattr(self, name) or rate)
        super().__post_init__()
        for name in ("progress_end", "max_probability", "bp_share"):
            value = getattr(self, name)
            if not value <= 1:
                raise UserError(f"{name}: must be at most 1, got {value}; it is a share")
        if self.min_probability > self.max_probability:
            raise UserError(
                f"min_probability: must be at most max_probability ({self.max_probability}), got "
                f"{self.min_probability}; lower it"
            )
        if self.trainable == "scales" and self.base_precision == "as-loaded":
            raise UserError(
                "base_precision: must be int8 or int4 where scales are trained, got as-loaded; a "
                "floating model has none"
            )
