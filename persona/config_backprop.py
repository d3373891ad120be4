# SPDX-License-Identifier: Apache-2.0
"""What the methods that train the UNet by backpropagation share."""

from dataclasses import dataclass

from persona.config import RunConfig
from persona.options import option


@dataclass(frozen=True)
class BackpropConfig(RunConfig):
    """Prompts and AdamW as diffusers' scripts have them.

    Raises:
        UserError: a value is out of range.
    """

    learnable_property: str = option(
        "photo",
        "prompts of pictures without a caption; photo: 'a photo of' the word and the class",
        choices=("photo", "object", "style"),
    )
    adam_beta1: float = option(0.9, "of AdamW", at_least=0, below=1)
    adam_beta2: float = option(0.999, "of AdamW", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "of AdamW, added outside the root", positive=True)
    adam_weight_decay: float = option(1e-2, "of AdamW", at_least=0)
    max_grad_norm: float = option(1.0, "longer gradients are shortened to it", positive=True)
    gradient_checkpointing: bool = option(
        False, "compute activations twice instead of keeping them"
    )


@dataclass(frozen=True)
class LoraConfig(BackpropConfig):
    """The size and the place of LoRA matrices.

    Raises:
        UserError: a value is out of range.
    """

    rank: int = option(2, "of the LoRA matrices", "lora_rank", at_least=1)
    lora_targets: str = option(
        "to_k,to_q,to_v,to_out.0", "layers of the UNet that get them: ends of their names"
    )
