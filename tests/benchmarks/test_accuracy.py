# SPDX-License-Identifier: Apache-2.0
"""Formats that fit the layers, figures of known errors, and the command on few samples."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import accuracy
from persona.families import StableDiffusion, load_pipeline


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(load_pipeline(str(accuracy.ASSETS / "tiny-sd")))


@pytest.fixture(scope="module")
def samples(model):
    return accuracy.samples_of(model, accuracy.pictures_of(None, model.resolution, 9), 4)


def test_layers_take_the_widest_groups_that_fit():
    net = nn.ModuleDict(
        {
            "wide": nn.Linear(128, 4),
            "narrow": nn.Linear(96, 4),
            "odd": nn.Conv2d(12, 4, 3),
            "conv_in": nn.Conv2d(64, 4, 3),
            "norm": nn.LayerNorm(4),
        }
    )
    assert accuracy.overrides_for(net, "w4a8-g64") == {
        "narrow": "w4a8-g32",
        "odd": "w8a8",
        "conv_in": "w8a8",
    }
    assert accuracy.overrides_for(net, "w4-g32") == {"odd": "w8", "conv_in": "w8"}
    assert accuracy.overrides_for(net, "w8a8") == {}


def test_compare_gives_the_change_of_the_loss_and_its_error():
    reference = torch.ones(4, 1, 1, 1)
    losses = torch.full((4,), 2.0, dtype=torch.float64)
    found = accuracy.compare(reference * 1.1, losses * 1.05, reference, losses)
    assert found == pytest.approx(
        {"loss": 2.1, "change": 0.05, "change_error": 0.0, "prediction_error": 0.1}, abs=1e-6
    )


def test_samples_are_fixed_and_cover_all_timesteps(model, samples):
    again = accuracy.samples_of(model, accuracy.pictures_of(None, model.resolution, 9), 4)
    assert torch.equal(samples.noise, again.noise) and torch.equal(samples.x0, again.x0)
    assert sorted(samples.t.tolist()) == [125, 375, 625, 875]


def test_quantizing_leaves_the_model_as_it_is(model, samples):
    before, losses = accuracy.predictions(model, samples)
    made, specs = accuracy.quantized(model, "w8a8", "absmax")
    after, quantized_losses = accuracy.predictions(made, samples)
    assert torch.equal(before, accuracy.predictions(model, samples)[0])
    assert made.pipe.vae is model.pipe.vae is not None
    assert set(specs) == {"w8a8"}
    found = accuracy.compare(after, quantized_losses, before, losses)
    assert 0 < found["prediction_error"] < 0.1
    noise = accuracy.layer_noise(model, made, samples)
    assert len(noise) == 119 and 20 < min(noise.values()) < max(noise.values()) < 80
    assert not any(m._forward_hooks for m in model.pipe.unet.modules())


def test_pictures_of_a_folder_have_prompts(tmp_path):
    np.savez(tmp_path / "train.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    records = [
        {"caption": "red apple", "style": "3d emoji", "variant": variant}
        for variant in (False, True)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    ((image, prompt),) = accuracy.pictures_of(tmp_path, 16, 5)
    assert image.size == (16, 16) and prompt == "a 3d emoji of a red apple"


def test_command(tmp_path, capsys):
    out = tmp_path / "accuracy.json"
    arguments = ["--samples", "3", "--specs", "w8a8,w4-g64", "--roundings", "absmax"]
    assert accuracy.main([*arguments, "--pictures", "0", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["fp32", "w8a8 absmax", "w4-g64 absmax"]
    assert rows[0]["change"] == rows[0]["prediction_error"] == 0
    assert rows[1]["prediction_error"] < rows[2]["prediction_error"]
    assert set(rows[2]["layers"]) == {"w8", "w4-g64", "w4-g32"}
    assert len(rows[1]["sqnr_worst_db"]) == accuracy.WORST
    assert "| w8a8 absmax" in capsys.readouterr().out


def test_command_refuses_no_samples(capsys):
    assert accuracy.main(["--samples", "0"]) == 2
    assert "samples must be at least 1" in capsys.readouterr().err
