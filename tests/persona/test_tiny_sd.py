# SPDX-License-Identifier: Apache-2.0
"""The shipped base model is one that diffusers itself loads, draws with and can recognise."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import ImageStat

from persona.demo import ASSETS

FOLDER = ASSETS / "tiny-sd"


def test_diffusers_loads_and_draws_without_an_argument():
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipe("a 3d emoji of a red apple", num_inference_steps=8, generator=generator).images[0]
    assert image.size == (64, 64)
    red, _, blue = ImageStat.Stat(image).mean
    assert red > 1.2 * blue


def test_weights_are_small_and_readable_by_everyone():
    files = [f for f in Path(FOLDER).rglob("*") if f.is_file()]
    weights = sum(f.stat().st_size for f in files if f.suffix == ".safetensors")
    assert 0 < weights <= 40_000_000
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in files)
