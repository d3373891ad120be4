# SPDX-License-Identifier: Apache-2.0
"""DreamBooth: bind a rare word to the subject by backpropagation through the UNet.

Ruiz et al. 2022, arXiv 2208.12242, as diffusers' scripts train it (the text encoder is frozen). The
whole UNet learns, or LoRA matrices on it; on an integer base these are QLoRA. Baselines: memory is
what backpropagation needs.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from persona.backprop import Backprop
from persona.batches import Batches, losses
from persona.class_pictures import class_pictures
from persona.config_dreambooth import DreamBoothConfig
from persona.data import Example
from persona.errors import UserError
from persona.families import StableDiffusion
from persona.files import make_folder
from persona.methods import _method
from persona.methods._method import Method, Step
from persona.optimizer_state import part_of, prefixed
from zo_kernels._files import atomic_write

WHOLE, WEIGHTS = "unet", "diffusion_pytorch_model.safetensors"  # diffusers' names


class DreamBooth(Method):
    """The UNet or its LoRA, AdamW's moments, and what is drawn from.

    Args:
        family: the model; its UNet is trained in place.
        config: options.
        examples: the subject's pictures.

    Raises:
        UserError: peft is missing, or no layer is called as lora_targets says.
    """

    def __init__(
        self, family: StableDiffusion, config: DreamBoothConfig, examples: list[Example]
    ) -> None:
        self.family, self.config = family, config
        self.steps = self.rejected = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        self.batches = Batches(family, examples, config, config.subject)
        self.prior = None
        if config.with_prior_preservation:
            pictures = class_pictures(family, config, self.batches.own)
            self.prior = Batches(family, pictures, config, config.subject)
        unet = family.unet
        if config.trainable == "lora":
            from persona.lora import Lora  # peft is needed for no other method

            self.lora = Lora(unet, config.rank, config.lora_targets, config.seed)
            self.parameters = self.lora.parameters
        else:
            self.parameters = dict(unet.requires_grad_(True).named_parameters())
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.backprop = Backprop(self.parameters.values(), config)

    @property
    def forwards(self) -> int:
        return self.steps * (2 if self.prior else 1)

    def run(self) -> Iterator[Step]:
        while self.steps < self.config.max_train_steps:
            yield self.step()

    def step(self) -> Step:
        """One update; the subject's loss and the prior's are derived one after the other."""
        terms = [self._loss(self.batches, 1.0)]
        if self.prior:
            terms.append(self._loss(self.prior, self.config.prior_loss_weight))
        loss, accepted = self.backprop.step(*terms)
        self.steps += 1
        self.rejected += not accepted
        return Step(self.steps, loss, self.forwards, self.rejected)

    def _loss(self, batches: Batches, weight: float) -> Callable[[], Tensor]:
        batch = batches.draw(self.generator)
        return lambda: weight * losses(self.family, batch).mean()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "counts": torch.tensor([self.steps, self.rejected]),
            "generator": self.generator.get_state(),
            **prefixed("parameters", {k: p.detach() for k, p in self.parameters.items()}),
            **prefixed("optimizer", self.backprop.state_dict()),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps, self.rejected = state["counts"].tolist()
        self.generator.set_state(state["generator"])
        for name, tensor in part_of("parameters", state).items():
            self.parameters[name].copy_(tensor)
        self.backprop.load_state_dict(part_of("optimizer", state))

    def save(self, folder: Path) -> Path:
        """LoRA: a file for ``pipe.load_lora_weights``; whole: a UNet folder for diffusers."""
        if self.config.trainable == "lora":
            return self.lora.save(folder, self.metadata())
        return _save_unet(self.family, folder)

    def metadata(self) -> dict[str, str]:
        name = f"dreambooth-{self.config.trainable}"
        return _method.metadata(self, self.config, name, len(self.batches))


def _save_unet(family: StableDiffusion, folder: Path) -> Path:
    """A folder for ``UNet2DConditionModel.from_pretrained``; the weights are never half there."""
    unet, place = family.unet, folder / WHOLE
    make_folder(place)
    try:
        unet.save_config(place)
        with atomic_write(place / WEIGHTS) as temporary:
            save_file(unet.state_dict(), temporary, metadata={"format": "pt"})
    except OSError as error:
        raise UserError(
            f"output_dir: {place} must be writable to the end, got {error.strerror}; free some "
            "space or choose another --output_dir"
        ) from error
    return place
