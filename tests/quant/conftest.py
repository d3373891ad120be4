# SPDX-License-Identifier: Apache-2.0
"""Small diffusers and transformers models, built in code with fixed random weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 32  # of the text features


def _status(field):
    """kB of this process."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.fixture
def extra_memory():
    """A function: calls its argument and returns the bytes by which memory grew meanwhile, at most.

    Mapped pages of files count.
    """

    def measure(function):
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        function()
        return (_status("VmHWM") - before) * 1024

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read from /proc")
    return measure


def make_unet():
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def make_text_encoder():
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=600,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )


def make_vae():
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=16,
    )


def unet_inputs():
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, 4, 8, 8, generator=g),
        torch.tensor(500),
        torch.randn(3, 7, WIDTH, generator=g),
    )


def text_inputs():
    return (torch.arange(2 * 16).reshape(2, 16) % 500,)


def vae_inputs():
    return (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)),)


MODELS = {
    "unet": (make_unet, unet_inputs),
    "text_encoder": (make_text_encoder, text_inputs),
    "vae": (make_vae, vae_inputs),
}


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


@pytest.fixture(params=MODELS)
def model_and_inputs(request):
    make, inputs = MODELS[request.param]
    return seeded(make), inputs()


@pytest.fixture
def unet():
    return seeded(make_unet)


@pytest.fixture
def text_encoder():
    return seeded(make_text_encoder)


@pytest.fixture
def pipeline(tmp_path):
    """A whole Stable Diffusion pipeline of a few hundred kilobytes."""
    characters = [*map(chr, range(33, 127)), *map(chr, range(161, 323))]
    tokens = [*characters, *(f"{c}</w>" for c in characters)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    for special, i in (("<|startoftext|>", 512), ("<|endoftext|>", 513)):
        vocabulary[special] = i
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16
    )
    pipe = StableDiffusionPipeline(
        vae=seeded(make_vae),
        text_encoder=seeded(make_text_encoder),
        tokenizer=tokenizer,
        unet=seeded(make_unet),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
