# SPDX-License-Identifier: Apache-2.0
"""What a training step sees: latents encoded once, and a draw of pictures, noise and timesteps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from persona.config import RunConfig
from persona.data import Example, to_pixels
from persona.families import LARGE, Predict, StableDiffusion
from persona.prefix import shared_prefix
from persona.timesteps import Window


class Batch(NamedTuple):
    """Noised latents [B, C, h, w], what the UNet should predict of them, timesteps [B], token ids
    [B, T]; all on the CPU."""

    x_t: Tensor
    target: Tensor
    t: Tensor
    ids: Tensor


class Batches:
    """Every picture's latents (and its mirror image's) and every prompt's token ids.

    Args:
        family: its VAE is used here and leaves; ask for no UNet before, or both are there at once.
        examples: the pictures with their prompts.
        config: train_batch_size, random_flip and the window of timesteps.
        words: what stands for ``{}`` in the prompts.
        resolutions: pixels a side that `draw` can be asked for; default: the pictures' own.
    """

    def __init__(
        self,
        family: StableDiffusion,
        examples: Sequence[Example],
        config: RunConfig,
        words: str,
        resolutions: Sequence[int] = (),
    ) -> None:
        self.family, self.config = family, config
        self.window = Window(config.min_timestep, config.max_timestep)
        images = [e.image for e in examples]
        self.own = images[0].width
        # Pixels a side -> mean and standard deviation, [views, pictures, C, h, w] each.
        self.latents = {side: self._encode(images, side) for side in resolutions or (self.own,)}
        family.release("vae")
        self.ids = [family.tokenize([p.replace("{}", words) for p in e.prompts]) for e in examples]

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.ids)

    @torch.no_grad()
    def _encode(self, images: list[Image.Image], side: int) -> tuple[Tensor, Tensor]:
        size = (side, side)
        rows = []
        for image in images:  # one at a time: the VAE's memory is for one
            fitted = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
            pixels = to_pixels([fitted])
            views = [pixels, pixels.flip(-1)] if self.config.random_flip else [pixels]
            rows.append([torch.cat(self.family.encode_images(view)).cpu() for view in views])
        both = torch.stack([torch.stack(row) for row in rows], 1)  # [views, pictures, 2, C, h, w]
        mean, std = both.unbind(2)
        return mean.contiguous(), std.contiguous()

    def draw(
        self,
        generator: torch.Generator,
        t: Tensor | None = None,
        *,
        resolution: int | None = None,
    ) -> Batch:
        """The next batch of ``generator``'s stream.

        Args:
            t: timesteps [B]; default: drawn from the window. The stream is then shorter by that.
            resolution: one of those that are cached; default: the pictures' own.
        """
        means, stds = self.latents[resolution or self.own]
        count = self.config.train_batch_size if t is None else len(t)
        picture = torch.randint(len(self.ids), (count,), generator=generator)
        view = torch.randint(len(means), (count,), generator=generator)
        mean, std = means[view, picture], stds[view, picture]
        x0 = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        if t is None:
            t = self.window.sample(count, generator)
        ids = [
            prompts[int(torch.randint(len(prompts), (), generator=generator))]
            for prompts in (self.ids[i] for i in picture.tolist())
        ]
        x_t, target = self.family.noised(x0, noise, t), self.family.target(x0, noise, t)
        return Batch(x_t, target, t, torch.stack(ids))


def losses(
    family: StableDiffusion, batch: Batch, copies: int = 1, predict: Predict | None = None
) -> Tensor:
    """Squared error of every member, mean over its elements: fp32 [copies * B], with the UNet's
    graph where gradients are enabled. The text encoder is frozen, and encodes one copy.

    predict: in place of `family.predict`.
    """
    x_t, t, target = on_device(batch, family.device)
    with torch.no_grad():
        hidden = family.encode_tokens(batch.ids).repeat(copies, 1, 1)
    x_t, target = (x.repeat(copies, 1, 1, 1) for x in (x_t, target))
    predicted = (predict or family.predict)(x_t, t.repeat(copies), hidden)
    return mean_errors(predicted, target)


def copies_at_a_time(family: StableDiffusion, batch: Batch) -> int:
    """How many copies of a batch hold no more activations than the drawing of a picture, which with
    guidance evaluates two; one, where a batch holds more."""
    drawn = 2 * max(LARGE, family.pipe.unet.config.sample_size**2)
    return max(1, drawn // batch.x_t[:, 0].numel())


def predict_copies(
    family: StableDiffusion, batch: Batch, count: int, predict: Predict | None = None
) -> tuple[Tensor, Tensor]:
    """What the UNet predicts for a batch [Q, B, C, h, w], under `count` = Q copies of a token that
    a hook serves now, and the target [B, C, h, w].

    predict: in place of `family.predict`.
    """
    x_t, t, target = on_device(batch, family.device)
    # Pictures share prompts: each is encoded once for every copy.
    ids, which = batch.ids.unique(dim=0, return_inverse=True)
    encoded = family.encode_tokens(ids.repeat(count, 1))
    which = which.to(family.device, non_blocking=True)
    hidden = encoded.unflatten(0, (count, -1))[:, which].flatten(0, 1)  # [Q * B, T, d]
    with shared_prefix(family.unet, count):
        predicted = (predict or family.predict)(x_t.repeat(count, 1, 1, 1), t.repeat(count), hidden)
    return predicted.unflatten(0, (count, -1)), target


def mean_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each of the predictions [Q, ...]: [Q]."""
    return (predicted - target).square().flatten(1).mean(1)


def on_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents, timesteps and target there; the host waits for no copy."""
    x_t, t, target = (
        value.to(device, non_blocking=True) for value in (batch.x_t, batch.t, batch.target)
    )
    return x_t, t, target
