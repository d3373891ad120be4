# SPDX-License-Identifier: Apache-2.0
"""Whole runs on the shipped model and the demo's pictures, a few steps each."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.torch import load_file

from persona.cli import main
from persona.config import TextualInversionConfig
from persona.demo import ASSETS, RECIPE, TOKEN
from persona.families import StableDiffusion, load_pipeline
from persona.train import textual_inversion
from zo_kernels.quant import QuantConfig

QUICK = {
    **RECIPE,
    "device": "cpu",
    "zo_n": 2,
    "zo_tau": 3,
    "train_batch_size": 1,
    "num_validation_images": 0,
    "max_train_steps": 5,
}


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "zo", "zo_space": "full", "zo_rank": 0},
        {"optimizer": "zo", "zo_estimator": "two_sided"},
    ],
    ids=str,
)
def test_resume_is_bit_identical(tmp_path, changes):
    config = TextualInversionConfig(**QUICK | changes, output_dir=str(tmp_path / "straight"))
    textual_inversion(config, progress=False)
    halves = dataclasses.replace(config, output_dir=str(tmp_path / "halves"))
    textual_inversion(dataclasses.replace(halves, max_train_steps=2), progress=False)
    textual_inversion(dataclasses.replace(halves, resume_from_checkpoint=True), progress=False)
    for name in ("checkpoint.safetensors", "learned_embeds.safetensors"):
        a, b = load_file(tmp_path / "straight" / name), load_file(tmp_path / "halves" / name)
        assert a.keys() == b.keys()
        assert all(a[key].equal(b[key]) for key in a), name
    assert losses(tmp_path / "straight") == losses(tmp_path / "halves")


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_diffusers_draws_the_same_picture(tmp_path, num_vectors):
    config = TextualInversionConfig(
        **QUICK | {"num_inference_steps": 3},
        num_vectors=num_vectors,
        output_dir=str(tmp_path),
    )
    prompt = "a 3d emoji of a {}"
    [inside] = textual_inversion(config, prompts=[prompt], progress=False).after
    family = StableDiffusion(load_pipeline(config.pretrained_model_name_or_path))
    family.quantize(QuantConfig("w8"))  # as the recipe says: floating activations
    family.pipe.load_textual_inversion(str(tmp_path))
    [outside] = family.sample(
        [prompt.format(TOKEN)], seed=config.seed, steps=3, guidance=config.guidance_scale
    )
    assert np.array_equal(np.asarray(inside), np.asarray(outside))


def test_a_bad_word_is_one_line_and_exit_code_2(tmp_path, capsys):
    folder = str(ASSETS / "tiny-sd")
    arguments = ["ti", "--pretrained_model_name_or_path", folder, "--output_dir", str(tmp_path)]
    arguments += ["--train_data_dir", str(ASSETS / "demo"), "--initializer_token", "qqzzxx"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("persona: ")
    assert "initializer_token" in error
    assert not list(tmp_path.iterdir())


def test_no_pictures_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    folder = str(ASSETS / "tiny-sd")
    arguments = ["ti", "--pretrained_model_name_or_path", folder, "--initializer_token", "lamp"]
    arguments += ["--train_data_dir", str(tmp_path / "empty"), "--output_dir", str(tmp_path / "o")]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("persona: ")
    assert "train_data_dir" in error
