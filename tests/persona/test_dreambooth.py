# SPDX-License-Identifier: Apache-2.0
"""DreamBooth: what it trains, what it refuses, how it resumes, and what diffusers reads of it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from persona.class_pictures import FOLDER
from persona.cli import main
from persona.config_dreambooth import DreamBoothConfig
from persona.data import load_folder
from persona.demo import ASSETS
from persona.errors import UserError
from persona.families import StableDiffusion, load_pipeline
from persona.methods import dreambooth
from persona.methods.dreambooth import DreamBooth
from persona.train import CHECKPOINT, train

FULL = {"trainable": "full", "base_precision": "as-loaded"}
PRIOR = {"with_prior_preservation": True, "num_class_images": 5}


@pytest.fixture
def config(short_run):
    """A function: changes -> options of a short run."""
    return lambda **changes: DreamBoothConfig(**short_run | {"max_train_steps": 2} | changes)


@pytest.fixture
def method(config, fresh_pipeline, pictures_folder):
    """A function: changes -> the method on a float model of its own."""

    def make(**changes):
        family = StableDiffusion(fresh_pipeline())
        options = config(base_precision="as-loaded", **changes)
        options.output.mkdir(exist_ok=True)
        return DreamBooth(family, options, load_folder(pictures_folder, resolution=64))

    return make


def test_defaults_are_the_papers():
    lora, full = DreamBoothConfig(), DreamBoothConfig(**FULL)
    assert (lora.max_train_steps, lora.learning_rate, lora.rank) == (500, 1e-4, 2)
    assert (full.max_train_steps, full.learning_rate) == (400, 5e-6)
    assert lora.subject == "sks" and lora.recipe()["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    "bad",
    [
        {"base_precision": "int4", "trainable": "full"},
        {"trainable": "some"},
        {"rank": 0},
        {"learning_rate": -1.0},
        {"max_grad_norm": 0.0},
        {"prior_loss_weight": math.nan},
        {"num_class_images": 0},
    ],
    ids=str,
)
def test_a_value_out_of_range(bad):
    with pytest.raises(UserError, match=rf"^{next(iter(bad))}: must be .*, got .*; "):
        DreamBoothConfig(**bad)


@pytest.mark.parametrize(
    "changes",
    [FULL | PRIOR, {"base_precision": "int4", "activation_precision": "int8"}],
    ids=["full, prior", "lora, w4a8"],
)
def test_resume_is_bit_identical(config, tmp_path, changes):
    straight = config(**changes, output_dir=str(tmp_path / "straight"))
    train(DreamBooth, straight, progress=False)
    halves = dataclasses.replace(straight, output_dir=str(tmp_path / "halves"))
    train(DreamBooth, dataclasses.replace(halves, max_train_steps=1), progress=False)
    train(DreamBooth, dataclasses.replace(halves, resume_from_checkpoint=True), progress=False)
    a, b = (load_file(tmp_path / name / CHECKPOINT) for name in ("straight", "halves"))
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def test_it_learns(method):
    """The loss of one fixed batch, before and after."""
    learner = method(trainable="full", learning_rate=1e-3, max_train_steps=12)
    batch = learner.batches.draw(torch.Generator().manual_seed(1), torch.arange(0, 1000, 50))
    with torch.no_grad():
        before = dreambooth.losses(learner.family, batch).mean()
        for _ in learner.run():
            pass
        assert dreambooth.losses(learner.family, batch).mean() < before
    assert learner.forwards == 12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing_and_is_counted(method, monkeypatch, bad, where):
    learner = method(trainable="lora")
    learner.step()
    before = {name: p.detach().clone() for name, p in learner.parameters.items()}
    state = {k: v for k, v in learner.state_dict().items() if k.startswith("optimizer")}

    def broken(family, batch):
        p = next(p for p in learner.parameters.values() if p.any())
        finite = (p - p.detach()).sqrt() if where == "gradient" else p * bad
        return finite.flatten()  # the derivative of the root is infinite at 0

    with monkeypatch.context() as patched:
        patched.setattr(dreambooth, "losses", broken)
        step = learner.step()
    assert (step.step, step.rejected) == (2, 1)
    assert all(p.equal(before[name]) and p.grad is None for name, p in learner.parameters.items())
    after = learner.state_dict()
    assert all(after[k].equal(v) for k, v in state.items())
    assert learner.step().rejected == 1


def test_the_prior_has_its_weight_and_its_prompt(method):
    learner = method(**PRIOR, prior_loss_weight=0.25, class_prompt="a toy")
    state = learner.generator.get_state()
    found = learner.step()
    g = torch.Generator()
    g.set_state(state)
    drawn = [learner.batches.draw(g), learner.prior.draw(g)]
    learner = method(**PRIOR, prior_loss_weight=0.25, class_prompt="a toy")
    own, prior = (dreambooth.losses(learner.family, b).mean().item() for b in drawn)
    assert found.loss == pytest.approx(own + 0.25 * prior, rel=1e-5)
    assert drawn[1].ids.equal(learner.family.tokenize(["a toy"]))
    assert found.forwards == 2


def test_class_pictures_are_made_once(method, monkeypatch):
    made = []
    sample = StableDiffusion.sample
    monkeypatch.setattr(
        StableDiffusion, "sample", lambda *a, **k: made.append(a[1]) or sample(*a, **k)
    )
    learner = method(**PRIOR)
    assert sum(map(len, made)) == 5 and made[0][0] == "a photo of toy"
    folder = learner.config.output / FOLDER
    assert len(list(folder.glob("*.png"))) == 5
    method(**PRIOR)
    assert sum(map(len, made)) == 5
    method(**PRIOR, class_prompt="a cat")
    assert sum(map(len, made)) == 10


def test_diffusers_reads_the_whole_unet(method, tmp_path):
    learner = method(trainable="full", learning_rate=1e-2)
    learner.step()
    saved = learner.save(tmp_path)
    read = UNet2DConditionModel.from_pretrained(saved)
    assert all(p.equal(learner.parameters[name]) for name, p in read.named_parameters())


def test_diffusers_draws_the_same_picture_with_the_lora(tmp_path):
    config = DreamBoothConfig(
        pretrained_model_name_or_path=str(ASSETS / "tiny-sd"),
        train_data_dir=str(ASSETS / "demo"),
        output_dir=str(tmp_path),
        initializer_token="lamp",
        base_precision="as-loaded",
        learning_rate=2e-2,
        max_train_steps=2,
        num_inference_steps=3,
    )
    result = train(DreamBooth, config, prompts=["a photo of {}"], progress=False)
    family = StableDiffusion(load_pipeline(config.pretrained_model_name_or_path))
    family.pipe.load_lora_weights(str(tmp_path))
    [outside] = family.sample(["a photo of sks lamp"], seed=0, steps=3, guidance=5.0)
    inside, before, outside = (
        np.asarray(image).astype(int) for image in (result.after[0], result.before[0], outside)
    )
    assert np.abs(inside - outside).max() <= 1
    assert np.abs(inside - before).max() > 20


def test_diffusers_reads_the_lora_of_an_integer_base(config, fresh_pipeline):
    saved = train(DreamBooth, config(max_train_steps=1), progress=False).saved
    pipe = fresh_pipeline()
    pipe.load_lora_weights(str(saved.parent))
    state = load_file(saved)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    read = pipe.unet.get_submodule(layer)
    assert read.lora_A["default_0"].weight.equal(state[f"unet.{layer}.lora.down.weight"])
    assert read.lora_B["default_0"].weight.equal(state[f"unet.{layer}.lora.up.weight"])
    assert read.scaling["default_0"] == 1 and state[f"unet.{layer}.lora.up.weight"].any()


def test_the_command(short_run, capsys):
    arguments = [f"--{name}={value}" for name, value in short_run.items()]
    assert main(["dreambooth", *arguments, "--max_train_steps=1"]) == 0
    assert "pytorch_lora_weights.safetensors: 1 steps, 1 forwards" in capsys.readouterr().out
    assert main(["dreambooth", *arguments, "--lora_targets=to_x"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("persona: lora_targets: must name ")
