# SPDX-License-Identifier: Apache-2.0
"""One adapter per model family: encode, noise, predict, target, sample.

So far: Stable Diffusion 1.x and 2.x.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from persona.errors import UserError
from persona.fused import fuse_
from persona.memory import trim
from persona.quiet import errors_only, no_bars
from zo_kernels.quant import QuantConfig, QuantReport, quantize_

with errors_only():
    from diffusers import DDPMScheduler, StableDiffusionPipeline

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # `StableDiffusion.predict`, or in its place
PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


def load_pipeline(model: str, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The pipeline of a local folder or hub id.

    Raises:
        UserError: the folder lacks parts, or nothing can be loaded from it.
    """
    folder = Path(model)
    if folder.exists():
        missing = [p for p in (*PARTS, "model_index.json") if not (folder / p).exists()]
        if missing:
            raise UserError(
                f"pretrained_model_name_or_path: must be a diffusers model folder with "
                f"{', '.join(PARTS)}, got {model} without {', '.join(missing)}; "
                "copy the whole folder"
            )
    try:
        with no_bars() if folder.exists() else nullcontext():  # a download takes long: shown
            pipe = StableDiffusionPipeline.from_pretrained(
                model, dtype=dtype, safety_checker=None, requires_safety_checker=False
            )
    except Exception as error:  # of many kinds, from three libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            "pretrained_model_name_or_path: must name a Stable Diffusion model in diffusers' "
            f"format, got {model} ({reason}); check the folder or the network"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def a_weight(model: torch.nn.Module) -> Tensor:
    """Some floating weight, to tell device and dtype by: diffusers' own properties walk over all
    modules at every look, several times a step."""
    return next(p for p in model.parameters() if p.is_floating_point())


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet that predicts eps or v.

    Args:
        pipe: its modules are used in place and frozen; nothing is copied.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe  # diffusers sets the modules by name: untyped
        for module in (pipe.unet, pipe.text_encoder, pipe.vae):
            module.requires_grad_(False).eval()
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.abar = self.schedule.alphas_cumprod  # [T]

    @property
    def device(self) -> torch.device:
        return a_weight(self.pipe.unet).device

    @property
    def resolution(self) -> int:
        """Pixels a side that the UNet was trained on."""
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    def quantize(
        self, config: QuantConfig, unet: QuantConfig | None = None
    ) -> dict[str, QuantReport]:
        """Hold the weights of UNet, text encoder and VAE as integers; merge what lies between.

        Args:
            unet: of the UNet, if not ``config``.
        """
        reports = {}
        for part in ("unet", "text_encoder", "vae"):
            model = getattr(self.pipe, part)
            if model is not None:
                chosen = unet if unet and part == "unet" else config
                reports[part] = quantize_(model, chosen)
                fuse_(model)
        return reports

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled mean and standard deviation, [B, C, h, w] each; pixels are [B, 3, H, W]."""
        vae = self.pipe.vae
        with torch.inference_mode():
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            scale = vae.config.scaling_factor
            mean, std = posterior.mean.float() * scale, posterior.std.float() * scale
        return mean.clone(), std.clone()

    def release_vae(self) -> Any:
        """Let the VAE go: training needs the cached latents only.

        Returns:
            The VAE, for a caller that draws pictures later and sets ``pipe.vae`` again.
        """
        vae, self.pipe.vae = self.pipe.vae, None
        return vae

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids, int64 [B, T] on the CPU, padded as the pipeline pads."""
        tokenizer = self.pipe.tokenizer
        return tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Hidden states [B, T, d] of token ids [B, T]."""
        return self.pipe.text_encoder(ids.to(self.device, non_blocking=True))[0]

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.schedule.add_noise(x0, noise, t)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet should predict: the noise, or the velocity."""
        kind = self.schedule.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.schedule.get_velocity(x0, noise, t)
        raise UserError(
            f"prediction_type: must be epsilon or v_prediction, got {kind!r} in the model's "
            "scheduler config; such a model cannot be personalized yet"
        )

    def predict(self, x_t: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """fp32 prediction [B, C, h, w]."""
        unet = self.pipe.unet
        dtype = a_weight(unet).dtype
        predicted: Tensor = unet(x_t.to(dtype), t, hidden.to(dtype)).sample.float()
        if self.device.type == "cpu":
            trim()  # a step may have dozens of forwards
        return predicted

    def sample(
        self,
        prompts: list[str],
        *,
        seed: int,
        steps: int,
        guidance: float,
        batch: int = 16,
    ) -> list[Image.Image]:
        """One picture a prompt; number i starts from noise ``seed + i``, whatever the batch."""
        out: list[Image.Image] = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
            out += self.pipe(
                part, num_inference_steps=steps, guidance_scale=guidance, generator=generators
            ).images
        return out
