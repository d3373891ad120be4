# SPDX-License-Identifier: Apache-2.0
"""One adapter per model family: encode, noise, predict, target, sample.

So far: Stable Diffusion 1.x and 2.x.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from persona.errors import UserError
from persona.fused import fuse_
from persona.memory import trim, trim_all
from persona.parts import MODELS, Parts
from persona.quiet import errors_only, no_bars
from zo_kernels.quant import QuantConfig, QuantReport, quantize_

with errors_only():
    from diffusers import DDPMScheduler, StableDiffusionPipeline

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # `StableDiffusion.predict`, or in its place
LARGE = 64 * 64  # latent pixels of what is computed at a time, if it need not be more
PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
# Models that judge pictures are neither read nor fetched.
_WITHOUT: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def load_pipeline(model: str, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The pipeline of a local folder or hub id, whole, in floats.

    Raises:
        UserError: the folder lacks parts, or nothing can be loaded from it.
    """
    folder = model_folder(model)
    with _reading(model), no_bars():
        pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, **_WITHOUT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model_folder(model: str) -> Path:
    """The folder of a model: itself, or where a hub id's files lie, fetched if they must be.

    Raises:
        UserError: a local folder lacks parts, or the hub has no such model or cannot be reached.
    """
    folder = Path(model)
    if not folder.exists():
        with _reading(model):
            return Path(StableDiffusionPipeline.download(model, **_WITHOUT))
    missing = [p for p in (*PARTS, "model_index.json") if not (folder / p).exists()]
    if missing:
        raise UserError(
            f"pretrained_model_name_or_path: must be a diffusers model folder with "
            f"{', '.join(PARTS)}, got {model} without {', '.join(missing)}; "
            "copy the whole folder"
        )
    return folder


@contextmanager
def _reading(model: Any) -> Iterator[None]:
    """Makes one kind of what three libraries raise while they read a model."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            "pretrained_model_name_or_path: must name a Stable Diffusion model in diffusers' "
            f"format, got {model} ({reason}); check the folder or the network"
        ) from error


def a_weight(model: torch.nn.Module) -> Tensor:
    """Some floating weight, to tell device and dtype by: diffusers' own properties walk over all
    modules at every look, several times a step."""
    return next(p for p in model.parameters() if p.is_floating_point())


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet that predicts eps or v.

    Args:
        pipe: its modules are used in place and frozen; nothing is copied.
        parts: where its models come from when they are first asked for, and again after `release`;
            None: they are those of `pipe`, and stay.

    Attributes:
        resolution: pixels a side that the UNet was trained on.
    """

    def __init__(self, pipe: Any, parts: Parts | None = None) -> None:
        self.pipe, self.parts = pipe, parts  # diffusers sets the modules by name: untyped
        self.resolution: int = pipe.unet.config.sample_size * pipe.vae_scale_factor
        for name in MODELS:
            if parts is not None:
                pipe.register_modules(**{name: None})
            elif (model := getattr(pipe, name)) is not None:
                model.requires_grad_(False).eval()
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.abar = self.schedule.alphas_cumprod  # [T]

    @classmethod
    def in_parts(cls, parts: Parts) -> Self:
        """A model whose parts come when they are asked for: tokenizer and schedule are there.

        Raises:
            UserError: the folder is none of such a model.
        """
        with _reading(parts.folder), no_bars():
            empty = {name: parts.empty(name) for name in MODELS}
            pipe = StableDiffusionPipeline.from_pretrained(parts.folder, **empty, **_WITHOUT)
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe, parts)

    @property
    def unet(self) -> Any:
        return self.need("unet").unet

    @property
    def text_encoder(self) -> Any:
        return self.need("text_encoder").text_encoder

    @property
    def vae(self) -> Any:
        return self.need("vae").vae

    def need(self, *names: str) -> Any:
        """The pipeline, with these parts there.

        Raises:
            UserError: a part cannot be read.
        """
        for name in names:
            if self.parts is not None and getattr(self.pipe, name) is None:
                with _reading(self.parts.folder), no_bars():
                    model = self.parts.load(name)
                self.pipe.register_modules(**{name: model})
                trim_all(self.device)
        return self.pipe

    def release(self, *names: str) -> None:
        """Let parts go until they are asked for again: as they were loaded, what a method changed
        in them is lost. Without `parts` they stay."""
        if self.parts is not None:
            self.pipe.register_modules(**dict.fromkeys(names))
            gc.collect()  # a model may hold itself, by a hook
            trim_all(self.device)

    @property
    def device(self) -> torch.device:
        return a_weight(self.pipe.unet).device if self.parts is None else self.parts.device

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
        vae = self.vae
        with torch.inference_mode():
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            scale = vae.config.scaling_factor
            mean, std = posterior.mean.float() * scale, posterior.std.float() * scale
        return mean.clone(), std.clone()

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
        return self.text_encoder(ids.to(self.device, non_blocking=True))[0]

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
        unet = self.unet
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
        batch: int | None = None,
    ) -> list[Image.Image]:
        """One picture a prompt; number i starts from noise ``seed + i``, whatever the batch.

        Args:
            batch: pictures at a time; default: as many as have the latents of one large one.
        """
        if not prompts:
            return []
        return self.decode(
            self.sample_latents(prompts, seed=seed, steps=steps, guidance=guidance, batch=batch)
        )

    def sample_latents(
        self,
        prompts: list[str],
        *,
        seed: int,
        steps: int,
        guidance: float,
        batch: int | None = None,
    ) -> Tensor:
        """What `sample` decodes: scaled latents [B, C, h, w] of at least one prompt, without the
        VAE."""
        pipe = self.need("unet", "text_encoder")
        side = pipe.unet.config.sample_size
        size = batch or at_a_time(side * side)
        out: list[Tensor] = []
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
            out += pipe(
                part,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="latent",
            ).images
        return torch.stack(out)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """PIL pictures of scaled latents [B, C, h, w]."""
        vae = self.vae
        out: list[Image.Image] = []
        for some in latents.split(at_a_time(latents[0, 0].numel())):
            scaled = some.to(vae.device, vae.dtype) / vae.config.scaling_factor
            images = vae.decode(scaled, return_dict=False)[0]
            out += self.pipe.image_processor.postprocess(images)
        return out


def at_a_time(values: int) -> int:
    """Pictures of so many latent pixels each that are drawn together: 16 of 16 x 16 latents, 1 of
    64 x 64, whose activations would else be the most that a run holds."""
    return max(1, min(16, LARGE // values))
