# SPDX-License-Identifier: Apache-2.0
"""`cuda_graph`: the same runs, and a step for which the host waits once."""

import dataclasses

import pytest
import torch
from elsewhere import Waits
from safetensors import safe_open
from tape import TapedGraph

from persona.cli import main
from persona.config import TextualInversionConfig
from persona.config_dreambooth import DreamBoothConfig
from persona.config_scales import ScaleTuningConfig
from persona.config_selective import SelectiveConfig
from persona.data import load_folder
from persona.errors import UserError
from persona.families import StableDiffusion
from persona.graphed import graphed
from persona.methods.scale_tuning import ScaleTuning
from zo_kernels.nn import graphed as evaluations
from zo_kernels.quant import QuantConfig

TOKENS = {
    "plain": {},
    "some at a time": {"evaluations_per_forward": 2},
    "checks": {
        "early_stopping_patience": 9,
        "early_stopping_steps": 4,
        "train_batch_size": 4,
    },
    "floats": {"base_precision": "as-loaded", "train_batch_size": 2},
}
SCALES = {
    "peqa": {"method": "peqa"},
    "additive": {
        "method": "peqa",
        "parametrization": "additive",
        "zo_eps": 1e-5,
        "learning_rate": 1e-8,
    },
    "s1": {"method": "s1", "intervals": "100-500"},
    "s2": {"method": "s2", "evaluations_per_forward": 3},
}


@pytest.fixture(params=["cpu", "taped"])
def graphs(request, monkeypatch):
    """What takes the place of CUDA graphs: plain calls, or a tape."""
    if request.param == "taped":
        monkeypatch.setattr(evaluations, "Graph", TapedGraph)
    return request.param


@pytest.fixture
def make_tuning(fresh_pipeline, pictures_folder):
    """A function: options -> scale tuning of a model of its own."""

    def make(config):
        family = StableDiffusion(fresh_pipeline())
        family.quantize(QuantConfig("w8a8"))
        return ScaleTuning(family, config, load_folder(pictures_folder, resolution=64))

    return make


@pytest.mark.parametrize("changes", TOKENS)
def test_a_token_learns_the_same_bits(graphs, options, make_method, changes):
    config = options(zo_eps=0.1, **TOKENS[changes])
    plain, replayed = make_method(config), make_method(dataclasses.replace(config, cuda_graph=True))
    for _ in range(4):
        assert plain.step() == replayed.step()
    here, there = plain.state_dict(), replayed.state_dict()
    assert all(here[name].equal(there[name]) for name in here)
    kinds = replayed.predict._kinds.values()
    assert len(kinds) == (1 if changes in ("plain", "floats") else 2)
    if graphs == "taped":
        assert all(kind.graph._graph is not None for kind in kinds)


@pytest.mark.parametrize("changes", SCALES)
def test_scales_learn_the_same_bits(graphs, short_run, make_tuning, changes):
    """Perturbations are made anew by each replay, and sets of scales take turns."""
    config = ScaleTuningConfig(
        **short_run, optimizer="zo", zo_n=2, train_batch_size=2, **SCALES[changes]
    )
    plain, replayed = make_tuning(config), make_tuning(dataclasses.replace(config, cuda_graph=True))
    for _ in range(4):
        assert plain.step() == replayed.step()
    assert replayed.rejected == 0
    here, there = plain.state_dict(), replayed.state_dict()
    assert all(here[name].equal(there[name]) for name in here)
    kinds = replayed.predict._kinds.values()
    assert len(kinds) <= (4 if changes == "s2" else 1)  # 1 or 2 members, 3 or 1 sides
    if graphs == "taped":
        assert any(kind.graph._graph is not None for kind in kinds)


def test_the_files_are_the_same(graphs, short_run, make_tuning, tmp_path):
    files = []
    for graph in (False, True):
        config = ScaleTuningConfig(**short_run, optimizer="zo", zo_n=1, cuda_graph=graph)
        tuning = make_tuning(config)
        for _ in range(3):
            tuning.step()
        with safe_open(tuning.save(tmp_path), "pt") as file:
            files.append((file.metadata(), {name: file.get_tensor(name) for name in file.keys()}))  # noqa: SIM118
    assert files[0][0] == files[1][0]
    assert all(files[1][1][name].equal(scale) for name, scale in files[0][1].items())


@pytest.mark.parametrize("kind", [TextualInversionConfig, ScaleTuningConfig])
def test_a_graph_is_no_part_of_a_recipe(kind):
    plain = kind(optimizer="zo")
    assert "cuda_graph" not in plain.recipe()
    assert dataclasses.replace(plain, cuda_graph=True).recipe() == plain.recipe()


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        (TextualInversionConfig, {"optimizer": "bp"}, "where optimizer is bp"),
        (ScaleTuningConfig, {}, "where optimizer is bp"),
        (ScaleTuningConfig, {"optimizer": "zo", "method": "tuneqdm"}, "where method is tuneqdm"),
    ],
)
def test_what_has_no_graph_refuses_it(kind, changes, text):
    with pytest.raises(UserError, match=f"cuda_graph: must be left out {text}"):
        kind(**changes, cuda_graph=True)


@pytest.mark.parametrize("kind", [DreamBoothConfig, SelectiveConfig])
def test_other_methods_do_not_have_the_option(kind, capsys):
    with pytest.raises(SystemExit):
        main([kind.command, "--cuda_graph"])
    assert "--cuda_graph: must be an option of the command" in capsys.readouterr().err


def test_another_device_is_refused(fresh_pipeline):
    family = StableDiffusion(fresh_pipeline())
    family.pipe.unet.to("meta")
    with pytest.raises(UserError, match=r"cuda_graph: must be left out where .* got meta"):
        graphed(family)


def test_command(command, tmp_path):
    assert main(command(cuda_graph=True, max_train_steps=2)) == 0
    assert (tmp_path / "out" / "learned_embeds.safetensors").exists()


def test_the_host_waits_once_for_a_token(options, make_method):
    """And what meets on the device lies there: tensors of the meta device refuse to meet others."""
    method = make_method(options(evaluations_per_forward=2))
    method.family.pipe.unet.to("meta")
    method.family.pipe.text_encoder.to("meta")
    with torch.no_grad(), Waits() as waits:
        losses = method._losses(method.probes(), method.draw())
    assert losses.device.type == "cpu" and len(losses) == 3
    assert waits.found == ["from"]


def test_the_host_waits_once_for_scales(short_run, make_tuning):
    config = ScaleTuningConfig(**short_run, optimizer="zo", zo_n=2, evaluations_per_forward=2)
    tuning = make_tuning(config)
    tuning.unet.to("meta")
    tuning.family.pipe.text_encoder.to("meta")
    tuning.sets.theta = [theta.to("meta") for theta in tuning.sets.theta]
    tuning.sets.base |= {name: scale.to("meta") for name, scale in tuning.sets.base.items()}
    batch = tuning.batches.draw(tuning.generator)
    with torch.no_grad(), Waits() as waits:
        losses = tuning._evaluate(0, batch, 0)
    assert losses.is_meta and not waits.found  # read once, by who has those of all sets
