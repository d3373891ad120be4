# SPDX-License-Identifier: Apache-2.0
"""Tiny Stable Diffusion folders with random weights, pictures, and options that fit them."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from persona.config import TextualInversionConfig
from persona.data import load_folder
from persona.families import StableDiffusion, load_pipeline
from persona.methods.textual_inversion import TextualInversion
from persona.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES
from zo_kernels.quant import QuantConfig

WIDTH = 32  # of the text features
LENGTH = 20  # tokens of a prompt
EOS = "<|endoftext|>"
SCHEDULERS = {
    "epsilon": (DDIMScheduler, {"clip_sample": False}),
    "v_prediction": (DPMSolverMultistepScheduler, {}),
}


def make_tokenizer():
    """CLIP's byte-level BPE, in which the words of the templates are one token each."""
    words = " ".join([*OBJECT_TEMPLATES, *STYLE_TEMPLATES, "dog cat toy sofa"])
    like = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    bpe.normalizer, bpe.pre_tokenizer = like.normalizer, like.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator([words], trainer)
    learned = json.loads(bpe.to_str())["model"]
    order = [*alphabet, *(c + "</w>" for c in alphabet), *learned["vocab"], "<|startoftext|>", EOS]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(order))}
    merges = [tuple(m) for m in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def make_pipeline(prediction_type):
    tokenizer = make_tokenizer()
    scheduler, options = SCHEDULERS[prediction_type]
    blocks = 4  # the VAE halves the picture between two of them: factor 8
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8,) * blocks,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            norm_num_groups=4,
            sample_size=64,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(prediction_type=prediction_type, steps_offset=1, **options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory):
    """``epsilon`` and ``v_prediction``: model folders in diffusers' own format."""
    folder = tmp_path_factory.mktemp("models")
    for prediction_type in SCHEDULERS:
        make_pipeline(prediction_type).save_pretrained(folder / prediction_type)
    return folder


@pytest.fixture(scope="session")
def model_folder(models_folder):
    return models_folder / "epsilon"


@pytest.fixture(scope="session")
def loaded(models_folder):
    """One pipeline of each kind, to be copied."""
    return {name: load_pipeline(str(models_folder / name)) for name in SCHEDULERS}


@pytest.fixture
def fresh_pipeline(loaded):
    """A function: prediction type -> a pipeline of its own for the test."""
    return lambda prediction_type="epsilon": copy.deepcopy(loaded[prediction_type])


def make_picture(seed=0, size=64):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture
def picture():
    """A function: seed, size -> a picture of its own."""
    return make_picture


@pytest.fixture(scope="session")
def pictures_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        make_picture(i).save(folder / f"{i}.png")
    (folder / "1.txt").write_text("a photo of {} on a sofa\n")
    return folder


@pytest.fixture
def short_run(model_folder, pictures_folder, tmp_path):
    """Options that every method has: a few steps without pictures, into tmp_path / "out"."""
    return {
        "pretrained_model_name_or_path": str(model_folder),
        "train_data_dir": str(pictures_folder),
        "output_dir": str(tmp_path / "out"),
        "initializer_token": "toy",
        "device": "cpu",
        "max_train_steps": 6,
        "num_validation_images": 0,
        "num_inference_steps": 2,
    }


@pytest.fixture
def options(short_run):
    """A function: changes -> options of a short run of textual inversion."""
    base = TextualInversionConfig(**short_run, zo_tau=4)
    return lambda **changes: dataclasses.replace(base, **changes)


@pytest.fixture
def make_method(fresh_pipeline, pictures_folder):
    """A function: options, prediction type -> the method on a model of its own."""

    def make(config, prediction_type="epsilon"):
        family = StableDiffusion(fresh_pipeline(prediction_type))
        if config.base_precision == "int8":
            family.quantize(QuantConfig())
        examples = load_folder(pictures_folder, resolution=family.resolution)
        return TextualInversion(family, config, examples)

    return make


@pytest.fixture
def command(options):
    """A function: changes -> the arguments of ``persona`` for ``options(**changes)``."""

    def make(*more, **changes):
        out = ["ti"]
        for name, value in dataclasses.asdict(options(**changes)).items():
            if isinstance(value, bool):
                out += [f"--{name}"] if value else []
            else:
                out += [f"--{name}", str(value)]
        return [*out, *more]

    return make
