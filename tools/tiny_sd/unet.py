# SPDX-License-Identifier: Apache-2.0
"""Stage 3: the UNet, and on request the text encoder with it, on cached latents.

v-prediction with its unweighted loss (Salimans & Ho 2022, "SNR+1"), captions dropped at 10 % for
classifier-free guidance (Ho & Salimans 2021), an exponential moving average of the weights. Min-SNR
weights starve the noisy timesteps, where an 8x8 latent gets its shape from the words.
"""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from .data import Pictures
from .run import Ema, Run
from .text import tokenize

CONFIG = {
    "sample_size": 8,
    "in_channels": 12,
    "out_channels": 12,
    "block_out_channels": (96, 192),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 256,
    "attention_head_dim": 4,  # in diffusers' UNet this is the number of heads
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
DROP_CAPTION = 0.1


class Pair(nn.Module):
    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text = unet, text


def loss_of(pair: Pair, schedule: DDPMScheduler, x0: Tensor, ids: Tensor, g: torch.Generator):
    """v-prediction loss; x0 [B, C, 8, 8], ids [B, LENGTH]."""
    noise = torch.randn(x0.shape, generator=g).contiguous(memory_format=torch.channels_last)
    t = torch.randint(schedule.config.num_train_timesteps, (len(x0),), generator=g)
    target = schedule.get_velocity(x0, noise, t)
    predicted = pair.unet(
        schedule.add_noise(x0, noise, t), t, pair.text(ids).last_hidden_state
    ).sample
    return (predicted - target).square().mean()


def train(
    pictures: Pictures,
    latents: tuple[Tensor, Tensor],
    tokenizer: CLIPTokenizer,
    text: CLIPTextModel,
    folder: Path,
    *,
    minutes: float,
    start: Path | None,
    tune_text: bool,
    batch: int = 32,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train (or resume, or continue from ``start``) for ``minutes``; return averaged models.

    latents: mean and standard deviation of each picture's posterior, both scaled to unit variance.
    tune_text: let the text encoder learn too; it costs a fifth of a step.
    """
    if start:
        unet = UNet2DConditionModel.from_pretrained(start / "unet")
    else:
        unet = UNet2DConditionModel(**CONFIG)
    pair = Pair(unet.to(memory_format=torch.channels_last), text.requires_grad_(tune_text)).train()
    schedule = DDPMScheduler(**SCHEDULE)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(unet.parameters()), "lr": 1e-3},
            {"params": list(text.parameters()), "lr": 1e-4},
        ],
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=True,
    )
    generator = torch.Generator().manual_seed(2)
    ema = Ema(pair)
    parts = {"pair": pair, "ema": ema}
    run = Run(folder / "unet.pt", minutes, parts, optimizer, generator=generator)
    mean, std = latents
    for _ in run:
        index = pictures.sample(batch, generator)
        x0 = mean[index] + std[index] * torch.randn(mean[index].shape, generator=generator)
        keep = torch.rand(batch, generator=generator) >= DROP_CAPTION
        prompts = [
            pictures.prompt(i, generator) if k else ""
            for i, k in zip(index.tolist(), keep.tolist(), strict=True)
        ]
        x0 = x0.contiguous(memory_format=torch.channels_last)
        loss = loss_of(pair, schedule, x0, tokenize(tokenizer, prompts), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        ema.update()
        run.log(v_loss=loss)
    ema.copy_to_module()
    return pair.unet.eval(), pair.text.eval()
