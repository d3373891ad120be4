# SPDX-License-Identifier: Apache-2.0
"""A whole pipeline of Stable Diffusion 1.5's shapes, with random weights; see `benchmarks.sd15`."""

from pathlib import Path
from typing import Any

import torch

from benchmarks import sd15

TOKENIZER = "persona/assets/tiny-sd/tokenizer"  # words cost no memory: any does
TEXT = {"sd15": (49_408, 768, 12, 12), "tiny": (5000, 64, 1, 2)}  # words, width, layers, heads
VAE = {"sd15": (128, 256, 512, 512), "tiny": (32, 32, 32, 32)}  # channels; factor 8


def pipeline(name: str) -> Any:
    """A `StableDiffusionPipeline` in fp32, of the size of an architecture of `sd15`."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words, width, layers, heads = TEXT[name]
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=sd15.TOKENS)
    text = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=sd15.TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    channels = VAE[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(text)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=2,
            sample_size=8 * sd15.ARCHITECTURES[name].size,
        )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=sd15.unet(name),
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(name: str, folder: Path) -> None:
    """Write it as such a model is published: diffusers' folders, safetensors, fp16."""
    pipe = pipeline(name)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.half()
    pipe.save_pretrained(folder)
