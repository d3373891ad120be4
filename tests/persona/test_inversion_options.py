# SPDX-License-Identifier: Apache-2.0
"""Textual inversion beyond ZOODiP's defaults: backpropagation, spaces, averaging, presets."""

import math
import re

import pytest
import torch

from persona.cli import main
from persona.config import TextualInversionConfig
from persona.errors import UserError
from persona.space import SPACES, Space

BP = {"optimizer": "bp", "adam_epsilon": 1e-8, "train_batch_size": 2}


def table(count=400, width=12):
    """Embeddings that spread ten times as much along one direction as along the last."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(1, 0.1, width)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return 0.3 + (torch.randn(count, width, generator=generator) * spread) @ turn, turn, spread


@pytest.mark.parametrize("precision", ["as-loaded", "int8"])
def test_backpropagation_is_the_slope_of_the_loss(options, make_method, precision):
    method = make_method(options(base_precision=precision, **BP))
    batch = method.batches.draw(torch.Generator().manual_seed(1))
    loss, gradient = method._backpropagate(batch)
    for seed in range(3):
        z = torch.randn(method.u.shape, generator=torch.Generator().manual_seed(seed))
        copies = torch.stack([method.u + sign * 1e-3 * z for sign in (1, -1)])
        with torch.inference_mode():
            plus, minus = method._losses(copies, batch).double().tolist()
        assert (plus - minus) / 2e-3 == pytest.approx((gradient * z).sum().item(), rel=0.05)
    assert math.isfinite(loss)


@pytest.mark.parametrize("precision", ["as-loaded", "int8"])
def test_only_the_new_rows_learn(options, make_method, precision):
    method = make_method(options(base_precision=precision, num_vectors=2, **BP))
    parts = (method.family.pipe.unet, method.family.pipe.text_encoder)
    before = [v.clone() for part in parts for v in part.state_dict().values()]
    rows = method.theta.clone()
    steps = [method.step() for _ in range(3)]
    after = [v for part in parts for v in part.state_dict().values()]
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))
    assert not method.theta.equal(rows) and not method.theta[0].equal(method.theta[1])
    assert (steps[-1].forwards, method.backwards) == (3, 3)
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def test_backpropagation_is_adamw(options, make_method):
    config = options(base_precision="as-loaded", adam_weight_decay=0.1, **BP)
    method, other = make_method(config), make_method(config)
    token = other.u.clone().requires_grad_()
    adam = torch.optim.AdamW([token], lr=config.learning_rate, weight_decay=0.1)
    for _ in range(4):
        method.step()
        other.u.copy_(token.detach())
        token.grad = other._backpropagate(other.batches.draw(other.generator))[1]
        adam.step()
    torch.testing.assert_close(method.theta, token.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", SPACES)
def test_the_start_is_in_every_space(kind):
    words, _, _ = table()
    moment = {"moment": lambda: torch.eye(12).double()} if kind == "encoder" else {}
    space = Space(words[:2], words, kind, rank=0 if kind == "full" else 5, **moment)
    u = space.coordinates()
    assert space.rows(u).equal(words[:2])
    assert u.shape == ((2, 12) if kind == "full" else (2, 5))
    assert space.rows(torch.stack([u, u + 1])).shape == (2, 2, 12)


def test_the_vocabulary_gives_directions_and_lengths():
    words, turn, spread = table(count=20_000)
    long, unit, noise = (
        Space(words[:1], words, kind, rank=6).map for kind in ("vocabulary", "subspace", "random")
    )
    for rows in (unit, noise):
        torch.testing.assert_close(rows @ rows.T, torch.eye(6), rtol=0, atol=1e-5)
    torch.testing.assert_close((unit @ turn.T)[:, :6].abs(), torch.eye(6), rtol=0, atol=0.15)
    lengths = long.norm(dim=1)
    assert lengths.square().mean() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(lengths / lengths[0], spread[:6], rtol=0, atol=0.03)
    assert (noise @ unit.T).abs().max() < 0.99


def test_a_space_that_there_is_not():
    words, _, _ = table()
    with pytest.raises(ValueError, match="Space: kind must be one of"):
        Space(words[:1], words, "half")
    with pytest.raises(ValueError, match="Space: rank must be from 0 to 12, got 13"):
        Space(words[:1], words, "random", rank=13)
    with pytest.raises(ValueError, match="Space: moment must be given for encoder"):
        Space(words[:1], words, "encoder")


def test_a_rank_above_the_embedding(options, make_method):
    with pytest.raises(UserError, match="zo_rank: must be at most the embedding's 32 dimensions"):
        make_method(options(zo_space="random", zo_rank=33))


def test_the_token_is_the_mean_of_its_iterates(options, make_method):
    method = make_method(options(average=0.5, zo_eps=0.1))
    seen = []
    for _ in range(3):
        method.step()
        seen.append(method.u.clone())
    mean = (0.125 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2]) / 0.875
    torch.testing.assert_close(method.theta, mean)


def test_a_cosine_ends_at_zero(options, make_method):
    method = make_method(options(learning_rate_schedule="cosine", zo_eps=0.1))
    factors = []
    for _ in range(6):
        method.step()
        factors.append(method._schedule())
    assert factors[0] == 1 and factors == sorted(factors, reverse=True)
    assert factors[3] == pytest.approx(0.5) and 0 < factors[-1] < 0.1


def test_a_cosine_cannot_be_resumed_with_another_end(options):
    recipe = options(learning_rate_schedule="cosine").recipe()
    assert recipe["max_train_steps"] == 6 and "max_train_steps" not in options().recipe()


@pytest.mark.parametrize(
    "changes",
    [
        BP,
        {"zo_estimator": "one_point", "zo_eps": 0.1},
        {"zo_space": "vocabulary", "zo_rank": 7, "average": 0.9, "zo_eps": 0.1},
        {"fixed_draws": 3, "zo_estimator": "two_sided", "zo_eps": 0.1},
        {"optimizer": "gauss-newton", "zo_space": "encoder", "zo_rank": 5, "zo_eps": 0.1},
        {"early_stopping_patience": 9, "early_stopping_steps": 2, "zo_eps": 0.1},
        {"zo_subspace": "centred", "learning_rate_schedule": "cosine", "zo_eps": 0.1},
    ],
    ids=str,
)
def test_a_run_resumes_to_the_bit(options, make_method, changes):
    config = options(num_vectors=2, **changes)
    straight, first, second = (make_method(config) for _ in range(3))
    for _ in range(6):
        straight.step()
    for _ in range(2):
        first.step()
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for _ in range(4):
        second.step()
    here, there = straight.state_dict(), second.state_dict()
    assert all(here[name].equal(there[name]) for name in here)
    assert straight.forwards == second.forwards


def test_fixed_draws_come_equally_often(options, make_method):
    method = make_method(
        options(fixed_draws=6, train_batch_size=4, min_timestep=100, max_timestep=160)
    )
    seen = [t for step in range(6) for t in method.fixed.at(step).t.tolist()]
    members = method.fixed.members.t.tolist()
    assert sorted(seen) == sorted(4 * members) and seen[:6] != seen[6:12]
    assert [t // 10 for t in members] == [10, 11, 12, 13, 14, 15]  # one in each part of the window
    first, again = method.fixed.at(0), method.fixed.at(0)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    state = method.generator.get_state()
    method.step()
    assert method.generator.get_state().equal(state)


def test_one_point_compares_neighbours(options, make_method):
    method = make_method(options(zo_estimator="one_point", zo_n=3))
    assert method.estimator.evaluations == 4
    draws = []
    probes = type(method.estimator).probes

    def noted(self, theta, *, draw, stream=0):
        draws.append(draw)
        return probes(self, theta, draw=draw, stream=stream)

    type(method.estimator).probes, kept = noted, probes
    try:
        steps = [method.step() for _ in range(2)]
    finally:
        type(method.estimator).probes = kept
    assert draws == [0, 4] and steps[-1].forwards == 8


def test_presets_differ_as_the_papers_do():
    paper, released = (TextualInversionConfig.from_preset(n) for n in ("paper", "released-code"))
    assert (paper.learning_rate, released.learning_rate) == (5e-3, 1e-2)
    assert (paper.zo_normalizer, released.zo_normalizer) == ("paper", "released-code")
    assert (paper.adam_epsilon, released.adam_epsilon) == (1e-8, 1e-3)
    for config in (paper, released):
        assert (config.zo_n, config.zo_eps, config.zo_tau, config.zo_nu) == (2, 1e-3, 128, 1e-3)
        assert (config.min_timestep, config.max_timestep) == (500, 900)
        assert (config.max_train_steps, config.zo_estimator) == (30_000, "one_sided")
    assert TextualInversionConfig.from_preset("backprop", learning_rate=1e-3).learning_rate == 1e-3
    with pytest.raises(
        UserError, match="preset: must be one of paper, released-code, gauss-newton, backprop"
    ):
        TextualInversionConfig.from_preset("best")


@pytest.mark.parametrize(
    ("arguments", "optimizer", "steps"),
    [
        ([], "gauss-newton", 100),
        (["--zo_n", "4"], "gauss-newton", 100),
        (["--optimizer", "zo"], "zo", 30_000),
        (["--preset=backprop"], "bp", 5000),
    ],
)
def test_the_recipe_without_a_preset(monkeypatch, arguments, optimizer, steps):
    seen = []
    monkeypatch.setattr("persona.cli.from_flags", lambda a, c: seen.append(a) or c())
    assert main(["ti", *arguments]) == 2  # nothing to train on
    assert (seen[0].optimizer, seen[0].max_train_steps) == (optimizer, steps)


def test_help_shows_the_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["ti", "--help"])
    assert "directions a step (default: 8)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "learning_rate"),
    [
        (["--preset", "released-code"], 1e-2),
        (["--preset=released-code", "--learning_rate", "3"], 3.0),
        (["--learning_rate", "5e-3", "--preset", "released-code"], 5e-3),
    ],
)
def test_flags_change_a_preset(monkeypatch, arguments, learning_rate):
    seen = []
    monkeypatch.setattr("persona.cli.from_flags", lambda a, c: seen.append(a) or c())
    assert main(["ti", *arguments]) == 2  # nothing to train on
    assert seen[0].learning_rate == learning_rate and seen[0].zo_normalizer == "released-code"


@pytest.mark.parametrize("arguments", [["--preset", "best"], ["--preset"]])
def test_a_preset_that_there_is_not(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(["ti", *arguments])
    assert stop.value.code == 2
    assert re.fullmatch(
        "persona: argument --preset: .*; see persona ti --help\n", capsys.readouterr().err
    )


def test_a_run_ends_where_the_fixed_loss_stops_falling(options, make_method):
    patient = {"early_stopping_patience": 2, "early_stopping_steps": 3}
    method = make_method(options(max_train_steps=99, learning_rate=1e-30, **patient))
    steps = list(method.run())
    assert len(steps) == 9 and method.stopping.checks == 3
    assert steps[-1].forwards == 9 * method.estimator.evaluations + 3 * 32


def test_early_stopping_leaves_the_best_token(options, make_method, monkeypatch):
    patient = {"early_stopping_patience": 2, "early_stopping_steps": 1, "zo_eps": 0.1}
    method = make_method(options(max_train_steps=99, **patient))
    losses = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(method, "_fixed_loss", lambda: next(losses))
    tokens = [method.theta.clone() for _ in method.run()]
    assert len(tokens) == 4 and not tokens[3].equal(tokens[1])
    assert method.theta.equal(tokens[1])
