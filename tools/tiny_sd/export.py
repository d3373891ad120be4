# SPDX-License-Identifier: Apache-2.0
"""Stage 4: the model folder in diffusers' own format, fp16 safetensors."""

import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from .unet import SCHEDULE

MAX_BYTES = 40_000_000


def write(
    out: Path,
    *,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
) -> None:
    """Save the pipeline beside ``out`` and swap it in whole; a model card already there is kept.

    Raises:
        ValueError: the weights are larger than MAX_BYTES.
    """
    pipe = StableDiffusionPipeline(
        vae=vae.to(torch.float16),
        text_encoder=text_encoder.to(torch.float16),
        tokenizer=tokenizer,
        unet=unet.to(torch.float16),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    pipe.save_pretrained(new, safe_serialization=True)
    _load_as_fp32(new / "text_encoder" / "config.json")
    tokenizer.backend_tokenizer.model.save(str(new / "tokenizer"))  # vocab.json, merges.txt
    weights = list(new.rglob("*.safetensors"))
    for file in weights:
        file.chmod(0o644)  # safetensors leaves them to their owner
    size = sum(file.stat().st_size for file in weights)
    if size > MAX_BYTES:
        raise ValueError(
            f"write: weights must be at most {MAX_BYTES} bytes, got {size}; use smaller sizes"
        )
    for kept in ("README.md", "VERSION"):
        if (out / kept).exists():
            shutil.copy2(out / kept, new / kept)
    old = out.with_name(out.name + ".old")
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)


def _load_as_fp32(config: Path) -> None:
    """transformers loads in the dtype that the config names, diffusers in fp32: let them agree."""
    facts = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
