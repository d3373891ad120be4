# SPDX-License-Identifier: Apache-2.0
"""`--device`: what it takes, and that a run keeps to it; the meta device stands for a GPU."""

import dataclasses

import pytest
import torch
from elsewhere import Numbers

from persona import base
from persona.base import load_base
from persona.cli import COMMANDS, main
from persona.config import TextualInversionConfig
from persona.config_dreambooth import DreamBoothConfig
from persona.config_scales import ScaleTuningConfig
from persona.config_selective import SelectiveConfig
from persona.data import load_folder
from persona.device import chosen
from persona.errors import UserError
from persona.methods.dreambooth import DreamBooth
from persona.methods.scale_tuning import ScaleTuning
from persona.methods.selective import Selective
from persona.methods.textual_inversion import TextualInversion

RUNS = {
    "token": (TextualInversion, TextualInversionConfig, {"activation_precision": "int8"}),
    "token, one at a time": (
        TextualInversion,
        TextualInversionConfig,
        {
            "num_vectors": 2,
            "evaluations_per_forward": 1,
            "zo_space": "random",
            "train_batch_size": 2,
            "early_stopping_patience": 9,
            "early_stopping_steps": 2,
            "fixed_draws": 4,
        },
    ),
    "token, backprop": (TextualInversion, TextualInversionConfig, {"optimizer": "bp"}),
    "tuneqdm": (ScaleTuning, ScaleTuningConfig, {"method": "tuneqdm", "in_scale_std": 0.01}),
    "s2": (ScaleTuning, ScaleTuningConfig, {"method": "s2", "optimizer": "zo"}),
    "lora, probed": (Selective, SelectiveConfig, {"strategy": "zo-high"}),
    "qlora": (DreamBooth, DreamBoothConfig, {}),
    "whole": (
        DreamBooth,
        DreamBoothConfig,
        {"trainable": "full", "base_precision": "as-loaded"},
    ),
}


@pytest.fixture
def see(monkeypatch):
    """A function: how many CUDA devices torch is to see from now on, None: no CUDA in it."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(count))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count or 0)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: count is not None)

    return pretend


@pytest.mark.parametrize(
    ("count", "name", "device"),
    [
        (None, "auto", "cpu"),
        (0, "auto", "cpu"),
        (1, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (1, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_names(see, count, name, device):
    see(count)
    assert chosen(name) == torch.device(device)


@pytest.mark.parametrize(
    ("count", "name", "told"),
    [
        (None, "cuda", "must be cpu where torch is built without CUDA, got 'cuda'; use cpu, or"),
        (0, "cuda:0", "got 'cuda:0' where there is no CUDA device; use cpu or auto, or see CUDA_"),
        (2, "cuda:2", "got 'cuda:2' where there is cuda:0, cuda:1; use cpu or auto"),
        (1, "gpu", "must be auto, cpu, cuda or cuda:N, got 'gpu'; auto takes"),
        (1, "cuda:", "must be auto, cpu, cuda or cuda:N, got 'cuda:'; auto takes"),
        (1, "cuda:-1", "must be auto, cpu, cuda or cuda:N, got 'cuda:-1'; auto takes"),
        (1, "", "must be auto, cpu, cuda or cuda:N, got ''; auto takes"),
        (1, "mps", "must be auto, cpu, cuda or cuda:N, got 'mps'; MPS has no float64, .* use cpu"),
    ],
)
def test_what_is_not_there(see, command, capsys, count, name, told):
    see(count)
    with pytest.raises(UserError, match=f"^device: .*{told}"):
        chosen(name)
    assert main(command(device=name)) == 2
    answer = capsys.readouterr().err
    assert answer.startswith("persona: device: must be ") and answer.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_it_and_no_checkpoint_asks_for_it(name):
    config = COMMANDS[name].config
    assert config().device == "auto"
    assert config(device="cuda:7").recipe() == config().recipe()


def test_all_of_a_model_is_there(options, monkeypatch):
    monkeypatch.setattr(base, "chosen", torch.device)
    family = load_base(options(device="meta"))
    assert family.device.type == "meta"
    for part in (family.pipe.unet, family.pipe.text_encoder, family.pipe.vae):
        assert {x.device.type for x in (*part.parameters(), *part.buffers())} == {"meta"}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_elsewhere(short_run, pictures_folder, tmp_path, monkeypatch, name):
    """Begun on the CPU, resumed on the device, then on the CPU again: all that meets there is
    there, and what is saved is not."""
    method, kind, changes = RUNS[name]
    monkeypatch.setattr(base, "chosen", torch.device)
    examples = load_folder(pictures_folder, resolution=64)
    config = kind(**short_run | changes)
    families = [load_base(dataclasses.replace(config, device=at)) for at in ("cpu", "meta")]
    here = method(families[0], config, examples)
    here.step()
    with Numbers():
        there = method(families[1], config, examples)
        there.load_state_dict(here.state_dict())
        there.step()
        state, saved = there.state_dict(), there.save(tmp_path)
        state = {name: tensor.cpu() for name, tensor in state.items()}
    here.load_state_dict(state)
    assert here.step().step == 3
    assert saved.exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_on_a_gpu(command):
    assert main(command(device="cuda", max_train_steps=2)) == 0
    assert main(command("--resume", device="cpu", max_train_steps=4)) == 0
    more = {"max_train_steps": 6, "num_validation_images": 1}
    assert main(command("--resume", device="auto", **more)) == 0
