# SPDX-License-Identifier: Apache-2.0
"""Options of DreamBooth."""

from dataclasses import dataclass
from typing import ClassVar

from persona.config_backprop import LoraConfig
from persona.errors import UserError
from persona.options import option

# Steps and learning rates of ZOODiP's comparison (arXiv 2503.14868, S1.5).
PAPER = {"full": (400, 5e-6), "lora": (500, 1e-4)}


@dataclass(frozen=True)
class DreamBoothConfig(LoraConfig):
    """DreamBooth (arXiv 2208.12242) by backpropagation through the UNet; defaults are those of
    ZOODiP's comparison (arXiv 2503.14868, S1.5): no prior preservation, QLoRA of rank 2.

    Raises:
        UserError: a value is out of range, or options contradict each other.
    """

    command: ClassVar[str] = "dreambooth"

    trainable: str = option(
        "lora",
        "the whole UNet, or LoRA matrices (on an integer base: QLoRA)",
        choices=("lora", "full"),
    )
    max_train_steps: int = option(
        0, "steps; 0: the paper's, 500 of lora, 400 of full", at_least=0, may_change=True
    )
    learning_rate: float = option(
        0.0, "of AdamW; 0: the paper's, 1e-4 of lora, 5e-6 of full", at_least=0
    )
    with_prior_preservation: bool = option(
        False, "train on the model's own pictures of the class as well"
    )
    prior_loss_weight: float = option(1.0, "of their loss", at_least=0)
    num_class_images: int = option(200, "how many of them, made once", at_least=1)
    class_prompt: str = option("", "their prompt; default: 'a photo of' and the class")

    def __post_init__(self) -> None:
        if self.trainable in PAPER:
            steps, rate = PAPER[self.trainable]
            object.__setattr__(self, "max_train_steps", self.max_train_steps or steps)
            object.__setattr__(self, "learning_rate", self.learning_rate or rate)
        super().__post_init__()
        if self.trainable == "full" and self.base_precision != "as-loaded":
            raise UserError(
                "base_precision: must be as-loaded where the whole UNet is trained, got "
                f"{self.base_precision}; integers have no gradient, train lora on them"
            )

    @property
    def prior_prompt(self) -> str:
        return self.class_prompt or f"a photo of {self.initializer_token}"
