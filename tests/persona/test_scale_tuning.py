# SPDX-License-Identifier: Apache-2.0
"""PEQA, S1, S2 and TuneQDM, by backpropagation and by forward passes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from persona.base import quantize
from persona.batches import losses
from persona.cli import main
from persona.config_scales import ScaleTuningConfig
from persona.data import load_folder
from persona.errors import UserError
from persona.families import StableDiffusion, load_pipeline
from persona.intervals import Intervals
from persona.methods.scale_tuning import ScaleTuning
from persona.scales import FILE, digest, load_scales
from persona.train import CHECKPOINT, train
from zo_kernels.nn import QuantModule, set_scales_
from zo_kernels.quant import QuantConfig

METHODS = ("peqa", "s1", "s2", "tuneqdm")


@pytest.fixture
def scale_options(model_folder, pictures_folder, tmp_path):
    """A function: changes -> options of a short run without pictures, into tmp_path / "out"."""
    base = ScaleTuningConfig(
        pretrained_model_name_or_path=str(model_folder),
        train_data_dir=str(pictures_folder),
        output_dir=str(tmp_path / "out"),
        initializer_token="toy",
        max_train_steps=4,
        train_batch_size=3,
        num_validation_images=0,
        num_inference_steps=4,
        zo_n=2,
    )
    return lambda **changes: dataclasses.replace(base, **changes)


@pytest.fixture
def make_tuning(fresh_pipeline, pictures_folder):
    """A function: options -> the method on a model of its own."""

    def make(config, spec="w8"):
        family = StableDiffusion(fresh_pipeline())
        family.quantize(QuantConfig(spec, fallback="w8"))
        return ScaleTuning(family, config, load_folder(pictures_folder, resolution=64))

    return make


def scales_of(unet):
    """The scales and input scales that are in place."""
    return {
        f"{name}.{kind}": getattr(module, kind).detach().clone()
        for name, module in unet.named_modules()
        if isinstance(module, QuantModule)
        for kind in ("scale", "in_scale")
        if getattr(module, kind) is not None
    }


@pytest.mark.parametrize("optimizer", ["bp", "zo"])
@pytest.mark.parametrize("method", METHODS)
def test_scales_move_and_nothing_else(make_tuning, scale_options, method, optimizer):
    tuning = make_tuning(scale_options(method=method, optimizer=optimizer))
    unet = tuning.unet
    before = digest(unet)
    frozen = {name: p.clone() for name, p in unet.named_parameters()}
    steps = list(tuning.run())
    assert [s.step for s in steps] == [1, 2, 3, 4] and steps[-1].rejected == 0
    assert steps[-1].forwards == 4 * (4 if optimizer == "zo" else 1)
    tuning.switch.place(None)
    assert digest(unet) == before
    assert all(
        torch.equal(p, frozen[name]) and p.grad is None for name, p in unet.named_parameters()
    )
    assert not any(m.perturbation for m in unet.modules() if isinstance(m, QuantModule))
    tuned = tuning.sets.scales(tuning.served.of(700))
    assert any(name.endswith(".in_scale") for name in tuned) == (method == "tuneqdm")
    base = scales_of(unet)
    moved = [not torch.equal(tuned[name], base.get(name, torch.ones(()))) for name in tuned]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize("relative", [True, False])
def test_gradients_are_those_of_the_loss(make_tuning, scale_options, relative):
    """Directional derivative along a random direction, by central differences."""
    config = scale_options(method="tuneqdm", num_intervals=1)
    kind = "relative" if relative else "additive"
    tuning = make_tuning(dataclasses.replace(config, parametrization=kind))
    batch = tuning.batches.draw(tuning.generator)
    theta = tuning.sets.theta[0]
    (grad,) = torch.autograd.grad(losses(tuning.family, batch).mean(), theta)
    unit = torch.cat(
        [
            (base if base is not None and not relative else torch.ones_like(own)).flatten()
            for base, own in zip(
                tuning.sets.base.values(), tuning.sets.views(theta.detach()), strict=True
            )
        ]
    )
    z = torch.randn(len(theta), generator=torch.Generator().manual_seed(5)) * unit
    sides, eps = [], 1e-3
    with torch.no_grad():
        for sign in (1, -1):
            theta += sign * eps * z
            sides.append(losses(tuning.family, batch).double().mean())
            theta -= sign * eps * z
    slope = (sides[0] - sides[1]) / (2 * eps)
    assert abs(slope - (grad * z).sum()) < 2e-2 * abs(slope)


@pytest.mark.parametrize("parametrization", ["relative", "additive"])
@pytest.mark.parametrize("method", ["peqa", "tuneqdm"])
def test_a_probe_is_the_loss_of_scales_that_were_moved(
    make_tuning, scale_options, method, parametrization
):
    """Both sides of every direction, in one pass or one by one, against scales moved by hand."""
    config = scale_options(
        method=method,
        optimizer="zo",
        parametrization=parametrization,
        num_intervals=1,
        zo_eps=1e-2 if parametrization == "relative" else 1e-5,
    )
    tuning = make_tuning(config)
    tuning.sets.move_(0, 1, [0], [config.zo_eps])  # from somewhere else than the start
    batch = tuning.batches.draw(tuning.generator)
    with torch.no_grad():
        together = tuning._evaluate(0, batch, 6)
        tuning.config = dataclasses.replace(config, evaluations_per_forward=1)
        one_by_one = tuning._evaluate(0, batch, 6)
        start, by_hand = tuning.sets.theta[0].clone(), []
        for draw in (6, 7):
            for sign in (1, -1):
                tuning.sets.move_(0, config.seed, [draw], [sign * config.zo_eps])
                by_hand.append(losses(tuning.family, batch).mean())
                tuning.sets.theta[0].copy_(start)
        tuning.switch.place(0)
        plain = losses(tuning.family, batch).mean()
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=0)
    torch.testing.assert_close(together, torch.stack(by_hand), rtol=1e-5, atol=0)
    assert (together - plain).abs().min() > 3e-5 * plain


def test_a_zeroth_order_step_goes_down_the_slope(make_tuning, scale_options):
    """With many directions it agrees with backpropagation's gradient."""
    config = scale_options(optimizer="zo", zo_n=64, zo_eps=1e-3, learning_rate=1e-6)
    tuning = make_tuning(config)
    batch = tuning.batches.draw(tuning.generator)
    tuning.sets.theta[0].requires_grad_()
    (grad,) = torch.autograd.grad(losses(tuning.family, batch).mean(), tuning.sets.theta[0])
    tuning.sets.theta[0].requires_grad_(False)
    tuning._probe([(0, batch)], 3)
    step = -tuning.sets.theta[0] / config.learning_rate
    cosine = torch.cosine_similarity(step, grad, dim=0)
    # n signs in d dimensions: about sqrt(n / (n + d)).
    assert cosine > 0.7 * (64 / (64 + len(grad))) ** 0.5


def test_sets_learn_from_their_own_timesteps(make_tuning, scale_options):
    """A mixed batch moves exactly the sets that it has members for, as these alone would."""
    for optimizer in ("bp", "zo"):
        config = scale_options(method="s2", num_intervals=4, optimizer=optimizer)
        tuning = make_tuning(config)
        batch = tuning.batches.draw(tuning.generator, torch.tensor([10, 990, 20]))
        tuning.batches.draw = lambda *_, batch=batch: batch
        tuning.step()
        moved = [bool(theta.detach().abs().sum() > 0) for theta in tuning.sets.theta]
        assert moved == [True, False, False, True]
    assert len(tuning.served.groups(batch.t)) == 2


def test_s1_trains_in_its_intervals_and_leaves_the_rest(make_tuning, scale_options):
    tuning = make_tuning(scale_options(method="s1", intervals="100-200,800-900"))
    before = scales_of(tuning.unet)
    drawn = torch.cat([tuning._sample_timesteps() for _ in range(200)])
    assert {(int(t) // 100) for t in drawn} == {1, 8}
    list(tuning.run())
    x, hidden = torch.randn(1, 4, 8, 8), torch.randn(1, 20, 32)
    with torch.no_grad():
        for t, same in ((50, True), (150, False), (500, True), (850, False)):
            tuning.unet(x, torch.tensor(t), hidden)
            now = scales_of(tuning.unet)
            assert all(torch.equal(now[k], before[k]) for k in before) == same
    everywhere = scale_options(method="s1", intervals="100-200", outside="tuned").served(1000)
    assert everywhere == Intervals.uniform(1, 1000)


def test_relative_steps_mean_the_same_at_8_and_4_bits(make_tuning, scale_options):
    """The largest relative change is the same; the additive step's differs by the scales' ratio."""
    change = {}
    for spec in ("w8", "w4"):
        for kind, rate in (("relative", 1e-3), ("additive", 3e-6)):
            few = {"max_train_steps": 2, "train_batch_size": 1}
            config = scale_options(parametrization=kind, learning_rate=rate, **few)
            tuning = make_tuning(config, spec)
            base = scales_of(tuning.unet)
            list(tuning.run())
            tuned = tuning.sets.scales(0)
            ratios = torch.cat([(tuned[k].detach() / base[k] - 1).flatten() for k in base])
            change[spec, kind] = ratios.abs().median().item()
    assert 0.8 < change["w8", "relative"] / change["w4", "relative"] < 1.25
    assert change["w8", "additive"] / change["w4", "additive"] > 8


def test_presets():
    ours = ScaleTuningConfig(method="tuneqdm")
    assert (ours.parametrization, ours.max_train_steps, ours.in_scale_std) == ("relative", 400, 0)
    paper = ScaleTuningConfig(method="tuneqdm", preset="paper")
    assert (paper.parametrization, paper.max_train_steps) == ("additive", 400)
    assert (paper.learning_rate, paper.in_scale_std, paper.num_intervals) == (3e-6, 0.01, 4)
    code = ScaleTuningConfig(method="tuneqdm", preset="released-code")
    assert (code.learning_rate, code.in_scale_std, code.adam_weight_decay) == (3e-6, 0, 1e-2)
    mine = ScaleTuningConfig(preset="paper", learning_rate=1e-5, max_train_steps=7)
    assert (mine.learning_rate, mine.max_train_steps) == (1e-5, 7)


def test_input_scales_start_with_a_spread(make_tuning, scale_options):
    tuning = make_tuning(scale_options(method="tuneqdm", preset="paper"))
    for number in range(4):
        scales = tuning.sets.scales(number)
        factors = torch.cat([v.detach() for k, v in scales.items() if k.endswith(".in_scale")])
        assert abs(factors.mean() - 1) < 1e-3 and abs(factors.std() - 0.01) < 1e-3
        assert torch.equal(scales["conv_in.scale"], tuning.sets.base["conv_in.scale"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"base_precision": "as-loaded"}, "base_precision: must be int8 or int4, got as-loaded"),
        ({"preset": "paper", "optimizer": "zo"}, "preset: must be ours where optimizer is zo"),
        ({"intervals": "9-3"}, "intervals: must be rising ranges"),
        ({"method": "lora"}, "method: must be one of peqa, s1, s2, tuneqdm"),
        ({"preset": "mine"}, "preset: must be one of ours, paper"),
        ({"zo_eps": 0.0}, "zo_eps: must be positive"),
    ],
)
def test_bad_options_are_refused(changes, text):
    with pytest.raises(UserError, match=text):
        ScaleTuningConfig(**changes)


def test_intervals_that_the_window_does_not_meet_are_refused(make_tuning, scale_options):
    with pytest.raises(UserError, match="intervals: must cover timesteps of 0 to 100, got 500"):
        make_tuning(scale_options(method="s1", max_timestep=100))


@pytest.mark.parametrize("optimizer", ["bp", "zo"])
def test_a_loss_that_is_not_finite_changes_nothing(make_tuning, scale_options, optimizer):
    tuning = make_tuning(scale_options(optimizer=optimizer))
    batch = tuning.batches.draw(tuning.generator)
    bad = batch._replace(target=torch.full_like(batch.target, float("nan")))
    tuning.batches.draw = lambda *_: bad
    step = tuning.step()
    assert step.rejected == 1 and not np.isfinite(step.loss)
    assert not tuning.sets.theta[0].any()


@pytest.mark.parametrize("optimizer", ["bp", "zo"])
def test_resume_is_bit_identical(scale_options, tmp_path, optimizer):
    config = scale_options(method="tuneqdm", optimizer=optimizer, train_batch_size=2)
    train(ScaleTuning, config, progress=False)
    halves = dataclasses.replace(config, output_dir=str(tmp_path / "halves"))
    train(ScaleTuning, dataclasses.replace(halves, max_train_steps=1), progress=False)
    train(ScaleTuning, dataclasses.replace(halves, resume_from_checkpoint=True), progress=False)
    for name in (CHECKPOINT, FILE):
        a, b = load_file(tmp_path / "out" / name), load_file(tmp_path / "halves" / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.parametrize("method", ["s1", "tuneqdm"])
def test_a_saved_file_draws_the_same_pictures(scale_options, model_folder, method):
    config = scale_options(method=method, num_validation_images=2, learning_rate=0.05)
    result = train(ScaleTuning, config, progress=False)
    family = StableDiffusion(load_pipeline(str(model_folder)))
    quantize(config, family)

    def pictures():
        shown = family.sample(["a photo of a sks toy"] * 2, seed=0, steps=4, guidance=5.0)
        return np.stack([np.asarray(picture) for picture in shown])

    before, trained = pictures(), np.stack([np.asarray(p) for p in result.after])
    kept = scales_of(family.pipe.unet)
    switch = load_scales(family.pipe.unet, result.saved)
    assert np.array_equal(pictures(), trained)
    assert not np.array_equal(before, trained)
    switch.remove()
    assert np.array_equal(pictures(), before)
    now = scales_of(family.pipe.unet)
    assert now.keys() == kept.keys() and all(torch.equal(now[k], kept[k]) for k in kept)
    with safe_open(result.saved, "pt") as file:
        header = file.metadata()
    assert header["persona.method"] == method
    assert json.loads(header["persona.scales"])["version"] == 1


def test_files_that_do_not_fit_are_refused(scale_options, model_folder, tmp_path):
    result = train(ScaleTuning, scale_options(max_train_steps=1), progress=False)
    family = StableDiffusion(load_pipeline(str(model_folder)))
    family.quantize(QuantConfig("w4"))
    with pytest.raises(UserError, match="scales: must belong to this model, got "):
        load_scales(family.pipe.unet, result.saved)
    with pytest.raises(UserError, match="scales: must be a readable file"):
        load_scales(family.pipe.unet, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="must be a file of persona scales, version 1, got"):
        load_scales(family.pipe.unet, tmp_path / "out" / CHECKPOINT)


def test_a_pass_through_several_intervals_is_refused(make_tuning, scale_options):
    tuning = make_tuning(scale_options(method="s2"))
    x, hidden = torch.randn(2, 4, 8, 8), torch.randn(2, 20, 32)
    with torch.no_grad(), pytest.raises(ValueError, match="timestep must lie in one interval"):
        tuning.unet(x, torch.tensor([1, 900]), hidden)


def test_checkpointing_gives_the_same_gradients(make_tuning, scale_options):
    found = []
    for checkpointing in (False, True):
        config = scale_options(gradient_checkpointing=checkpointing, max_train_steps=2)
        tuning = make_tuning(config)
        list(tuning.run())
        found.append(tuning.sets.theta[0].detach())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_command(scale_options, capsys, tmp_path):
    config = scale_options(max_train_steps=1, method="tuneqdm", optimizer="zo")
    words = ["scales"]
    for name, value in dataclasses.asdict(config).items():
        if not isinstance(value, bool):
            words += [f"--{name}", str(value)]
    assert main(words) == 0
    assert f"{tmp_path / 'out' / FILE}: 1 steps, 4 forwards" in capsys.readouterr().out


def test_scales_of_another_shape_are_refused(make_tuning, scale_options):
    tuning = make_tuning(scale_options())
    with pytest.raises(ValueError, match=r"conv_in.scale must be of shape \[16\]"):
        set_scales_(tuning.unet, {"conv_in.scale": torch.ones(3)})
