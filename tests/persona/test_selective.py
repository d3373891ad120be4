# SPDX-License-Identifier: Apache-2.0
"""Selective optimization: which kind a step is, what each kind does, and how a run resumes."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from persona.base import quantize
from persona.cli import main
from persona.config_selective import SelectiveConfig
from persona.data import load_folder
from persona.errors import UserError
from persona.families import StableDiffusion
from persona.methods import selective
from persona.methods.selective import KINDS, Selective
from persona.scales import FILE, load_scales
from persona.selection import PROGRESS_CURVES, TIMESTEP_CURVES, Selection
from persona.train import CHECKPOINT, train
from zo_kernels.rng import noise

STEPS = 4
ALONE = ("bp-low", "bp-high", "zo-high")


@pytest.fixture
def config(short_run):
    """A function: changes -> options of a short run; pictures of 64 and 32 pixels."""
    return lambda **changes: SelectiveConfig(**short_run | {"max_train_steps": STEPS} | changes)


@pytest.fixture
def method(config, fresh_pipeline, pictures_folder):
    """A function: changes -> the method on a model of its own."""

    def make(**changes):
        family, options = StableDiffusion(fresh_pipeline()), config(**changes)
        quantize(options, family)
        return Selective(family, options, load_folder(pictures_folder, resolution=64))

    return make


def copies(learner):
    return {name: p.detach().clone() for name, p in learner.parameters.items()}


@pytest.mark.parametrize("progress", PROGRESS_CURVES)
@pytest.mark.parametrize("timestep", TIMESTEP_CURVES)
def test_the_probability_falls_in_both_and_is_clipped(timestep, progress):
    selection = Selection(timestep, progress, low=0.1, high=0.9)
    grid = [[selection.probability(t / 20, k / 10) for t in range(20)] for k in range(11)]
    for values in (*grid, *zip(*grid, strict=True)):
        assert all(0.1 <= a <= 0.9 and a >= b for a, b in pairwise(values))


def test_values_of_the_curves():
    assert Selection().probability(0.5, 0) == 0.5
    assert Selection(width=1e-9).probability(0.999, 0) == pytest.approx(0)
    assert Selection().probability(0.6, 1) == pytest.approx(0.2 / (1 + math.e))
    assert Selection("step", "constant").probability(0.49, 1) == 1
    assert Selection("step").probability(0.5, 0) == 0
    assert Selection("linear", "cosine").probability(0.25, 0.5) == pytest.approx(0.75 * 0.6)
    assert Selection("constant", "linear", end=0).probability(0.9, 0.75) == 0.25


def test_the_coin_decides(method):
    learner = method(train_batch_size=2)
    t = torch.tensor([500, 600])
    p = (0.5 + 1 / (1 + math.e)) / 2
    assert learner.kind(t, p - 1e-6) == "bp-low" and learner.kind(t, p + 1e-6) == "zo-high"
    learner.steps = STEPS // 2  # g is 0.6 there
    assert learner.kind(t, 0.6 * p - 1e-6) == "bp-low"
    assert learner.kind(t, 0.6 * p + 1e-6) == "zo-high"


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    [
        *((kind, [kind] * STEPS) for kind in ALONE),
        ("two-phase", ["bp-low"] + ["zo-high"] * 3),
    ],
)
def test_strategies(method, monkeypatch, strategy, kinds):
    seen = []

    def losses(family, batch):
        seen.append((batch.x_t.shape[-1], torch.is_grad_enabled()))
        return sum(p.sum() for p in learner.parameters.values())[None]

    learner = method(strategy=strategy, bp_share=0.25)
    monkeypatch.setattr(selective, "losses", losses)
    assert [step.more["kind"] for step in learner.run()] == kinds
    expected = {"bp-low": [(4, True)], "bp-high": [(8, True)], "zo-high": [(8, False)] * 2}
    assert seen == [call for kind in kinds for call in expected[kind]]
    assert learner.counts == {kind: kinds.count(kind) for kind in KINDS}
    assert learner.forwards == len(seen)
    assert all((learner.peaks[kind] > 0) == (kind in kinds) for kind in KINDS)


def test_a_constant_share(method, monkeypatch):
    learner = method(strategy="constant", bp_share=0.3)
    coins = torch.rand(4000, generator=torch.Generator().manual_seed(0)).tolist()
    found = [learner.kind(torch.tensor([500]), coin) for coin in coins]
    assert found.count("bp-low") / 4000 == pytest.approx(0.3, abs=0.03)  # four deviations


@pytest.mark.parametrize("trainable", ["lora", "scales"])
@pytest.mark.parametrize("kind", ALONE)
def test_each_kind_has_a_state_of_its_own(method, trainable, kind):
    learner = method(strategy=kind, trainable=trainable)
    before = copies(learner)
    learner.step()
    assert any(not p.equal(before[name]) for name, p in learner.parameters.items())
    assert bool(learner.backprop.optimizer.state) == (kind != "zo-high")
    assert learner.zo.steps == (kind == "zo-high")


def test_zo_high_is_mezo(method):
    """theta - lr c z with c from the losses at theta + eps z and theta - eps z."""
    learner = method(strategy="zo-high", trainable="scales", zo_eps=0.05, zo_learning_rate=0.3)
    [(name, theta)] = copies(learner).items()
    [stream] = learner.zo.param_groups[0]["streams"]
    z = noise(theta.numel(), seed=0, draw=0, stream=stream)
    generator = torch.Generator().manual_seed(0)
    t = learner.batches.window.sample(1, generator)
    torch.rand((), generator=generator)  # the coin
    batch = learner.batches.draw(generator, t)
    found = []
    with torch.no_grad():
        for sign in (1, -1):
            learner.parameters[name].copy_(theta + sign * 0.05 * z)
            found.append(selective.losses(learner.family, batch).item())
        learner.parameters[name].copy_(theta)
    step = learner.step()
    assert step.loss == pytest.approx(sum(found) / 2, rel=1e-5)
    c = (found[0] - found[1]) / 0.1
    change = learner.parameters[name].detach() - theta
    cosine = torch.cosine_similarity(change, -z, dim=0) * math.copysign(1, c)
    assert cosine == pytest.approx(1, abs=1e-5)
    assert change.norm().item() == pytest.approx(0.3 * abs(c) * z.norm().item(), rel=1e-2)


@pytest.mark.parametrize("kind", ["bp-low", "zo-high"])
def test_what_is_not_finite_changes_nothing_and_is_counted(method, monkeypatch, kind):
    learner = method(strategy=kind)
    learner.step()
    before = copies(learner)
    with monkeypatch.context() as patched:
        patched.setattr(selective, "losses", lambda *_: torch.tensor([math.nan]))
        assert learner.step().rejected == 1
    assert all(p.equal(before[name]) for name, p in learner.parameters.items())
    assert learner.step().rejected == 1


@pytest.mark.parametrize(
    "changes", [{}, {"trainable": "scales", "base_precision": "int4"}], ids=["lora", "scales"]
)
def test_resume_is_bit_identical(config, tmp_path, monkeypatch, changes):
    """A run of both kinds, stopped in its middle."""
    changes |= {"strategy": "two-phase", "bp_share": 0.75, "checkpointing_steps": 2}
    straight = config(**changes, output_dir=str(tmp_path / "straight"))
    train(Selective, straight, progress=False)
    halves = dataclasses.replace(straight, output_dir=str(tmp_path / "halves"))
    step = Selective.step

    def stopped(self):
        if self.steps == 2:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Selective, "step", stopped)
        train(Selective, halves, progress=False)
    train(Selective, dataclasses.replace(halves, resume_from_checkpoint=True), progress=False)
    a, b = (load_file(tmp_path / name / CHECKPOINT) for name in ("straight", "halves"))
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
    assert a["counts"].tolist() == [STEPS, 0, 3, 0, 1]


def test_scales_are_read_again(method, tmp_path):
    learner = method(trainable="scales", strategy="bp-low", learning_rate=0.1)
    batch = learner.batches.draw(torch.Generator(), resolution=64)
    other = method().family  # its LoRA adds nothing
    with torch.no_grad():
        before = selective.losses(learner.family, batch)
        assert selective.losses(other, batch).allclose(before)
        learner.step()
        after = selective.losses(learner.family, batch)
        assert not after.allclose(before)
        plain = method(trainable="scales")
        plain.trainable.switch.remove()
        load_scales(plain.family.pipe.unet, learner.save(tmp_path))
        assert selective.losses(plain.family, batch).allclose(after)
    assert (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"strategy": "some"},
        {"timestep_width": 0.0},
        {"progress_end": 1.5},
        {"bp_share": -0.5},
        {"min_probability": 0.9, "max_probability": 0.5},
        {"base_precision": "as-loaded", "trainable": "scales"},
        {"zo_eps": math.nan},
    ],
    ids=str,
)
def test_a_value_out_of_range(bad):
    with pytest.raises(UserError, match=rf"^{next(iter(bad))}: must be .*, got .*; "):
        SelectiveConfig(**bad)


def test_the_command(short_run, capsys):
    arguments = [f"--{name}={value}" for name, value in short_run.items()]
    assert main(["selective", *arguments, "--max_train_steps=1", "--strategy=zo-high"]) == 0
    assert "pytorch_lora_weights.safetensors: 1 steps, 2 forwards" in capsys.readouterr().out
    assert main(["selective", *arguments, "--low_resolution=20"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("persona: low_resolution: must be a multiple of the model's 8 pixels")
    assert main(["selective", *arguments, "--low_resolution=72"]) == 2
    assert "low_resolution: must be below" in capsys.readouterr().err.splitlines()[-1]
