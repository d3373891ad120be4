# SPDX-License-Identifier: Apache-2.0
"""What is told of a run's memory before it: against the tensors of a real one, and kept to."""

import dataclasses
import json
from itertools import islice

import pytest
import torch

from persona.base import load_base, open_base
from persona.cli import COMMANDS, load_method, main
from persona.config import RunConfig
from persona.data import load_folder
from persona.errors import UserError
from persona.options import parse_size
from persona.outline import META, FlashAttention, Ledger, Outline
from persona.parts import MODELS
from persona.plan import Plan, keep_budget, plan
from persona.train import train
from zo_kernels.quant.convert import model_bytes

PARTS = ["loading", "pictures before", "training", "pictures after", "decoding"]
RUNS = [
    ("ti", {}),
    ("ti", {"optimizer": "bp"}),
    ("ti", {"base_precision": "as-loaded"}),
    ("ti", {"optimizer": "gauss-newton", "zo_rank": 8, "zo_space": "encoder"}),
    ("scales", {"method": "tuneqdm"}),
    ("scales", {"method": "s2", "optimizer": "zo"}),
    ("dreambooth", {}),
    ("dreambooth", {"trainable": "full", "base_precision": "as-loaded"}),
    ("dreambooth", {"with_prior_preservation": True, "num_class_images": 2}),
    ("selective", {}),
    ("selective", {"trainable": "scales"}),
]


def of(name, options):
    command = COMMANDS[name]
    return load_method(command.method), command.config(**options)


def peak_of_steps(family, method_class, config, examples):
    """Bytes that two steps have alive beside the model, of torch's tensors."""
    with Ledger() as ledger:
        method = method_class(family, config, examples)
        for name in ("text_encoder", "unet"):
            for tensor in (*getattr(family, name).parameters(), *getattr(family, name).buffers()):
                ledger.hold(tensor)
        before, peaks = ledger.now, {}
        with ledger.part("steps", peaks):
            for _ in islice(method.run(), 2):
                pass
    return peaks["steps"] - before


@pytest.mark.parametrize(("name", "more"), RUNS, ids=str)
def test_every_method_has_a_plan(short_run, tmp_path, name, more):
    method_class, config = of(name, short_run | {"num_validation_images": 1} | more)
    told = plan(method_class, config)
    assert list(told.parts) == PARTS and told.highest > told.libraries > 0
    assert not list(tmp_path.iterdir())  # nothing is written


@pytest.mark.parametrize(("name", "more"), RUNS[:-3], ids=str)
def test_a_step_holds_what_was_told(short_run, pictures_folder, name, more):
    method_class, config = of(name, short_run | more)
    real = open_base(config)
    examples = load_folder(pictures_folder, resolution=64)
    measured = peak_of_steps(real, method_class, config, examples)
    with FlashAttention(), Ledger() as ledger:
        family = Outline.of(config, ledger)
        told = peak_of_steps(family, method_class, config, examples)
    assert told == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("precision", ["int8", "int4", "as-loaded"])
def test_models_hold_what_was_told(model_folder, precision):
    config = RunConfig(
        pretrained_model_name_or_path=str(model_folder), device="cpu", base_precision=precision
    )
    real = load_base(config)
    with Ledger() as ledger:
        family = Outline.of(config, ledger)
        family.need(*MODELS)
        assert ledger.now == sum(model_bytes(getattr(real.pipe, name)) for name in MODELS)
        assert ledger.peak > ledger.now  # one layer in floats
        family.release(*MODELS)
        assert ledger.now == 0


def test_tensors_count_while_they_live():
    with Ledger() as ledger:
        a = torch.ones(1000)
        b = a[10:].view(-1)
        assert ledger.now == 4000
        c = torch.ones(500, device=META) + 1
        assert ledger.now == 6000 and ledger.peak == 8000
        del a, c
        assert ledger.now == 4000 and len(b) == 990
        peaks = {}
        with ledger.part("small", peaks):
            torch.ones(25)
        assert peaks == {"small": 4100}
        assert torch.zeros(3, device=META).cpu().tolist() == [0, 0, 0]
        assert torch.zeros((), device=META).item() == 0
        assert torch.isfinite(torch.zeros(2, device=META)).all()
    with Ledger(host=False) as ledger:
        kept = torch.ones(10), torch.ones(10, device=META)
        assert ledger.now == 40 and len(kept) == 2


@pytest.mark.parametrize("flag", ["--base_precision int4", "--gradient_checkpointing"])
def test_a_budget_that_is_too_small_is_refused_with_what_fits(short_run, monkeypatch, flag):
    heavy, light = Plan(0, 0, {"loading": 1, "training": 900}), Plan(0, 0, {"training": 100})

    def told(method_class, config):
        options = {f"--{k} {v}" for k, v in vars(config).items()} | {
            f"--{k}" for k, v in vars(config).items() if v is True
        }
        return light if flag in options else heavy

    monkeypatch.setattr("persona.plan.plan", told)
    method_class, config = of("dreambooth", short_run | {"memory_budget": "100 B"})
    with pytest.raises(UserError) as error:
        keep_budget(method_class, config)
    assert str(error.value) == (
        "memory_budget: must be at least 900 B, which training takes, got 100 B; "
        f"{flag} takes 100 B"
    )
    keep_budget(method_class, dataclasses.replace(config, memory_budget="900b"))


def test_a_budget_that_nothing_meets_is_told(command, capsys, tmp_path):
    assert main(command(memory_budget="1MB")) == 2
    told = capsys.readouterr().err
    assert told.startswith("persona: memory_budget: must be at least ")
    assert "got 1MB; the least that other options take is " in told
    assert not list(tmp_path.glob("out/*"))


def test_a_run_that_holds_more_than_was_told_stops_and_can_go_on(short_run, tmp_path, monkeypatch):
    monkeypatch.setattr("persona.train.keep_budget", lambda *_: None)
    method_class, config = of("ti", short_run | {"memory_budget": "1MB"})
    with pytest.raises(UserError, match="that the run has held, got 1MB; raise it and go on with"):
        train(method_class, config, progress=False)
    more = dataclasses.replace(config, memory_budget="30GB", resume_from_checkpoint=True)
    result = train(method_class, more, progress=False)
    assert result.steps == config.max_train_steps
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1


def test_a_run_within_its_budget(command):
    assert main(command(memory_budget="30GB", max_train_steps=1)) == 0


def test_sizes():
    sizes = {"1.5GB": 1_500_000_000, "900MiB": 900 << 20, "2 kb": 2000, "0B": 0, "3GIB": 3 << 30}
    assert {text: parse_size("x", text) for text in sizes} == sizes
    for text in ("", "1.5", "GB", "-1GB", "1 TB", "1e3MB"):
        with pytest.raises(UserError, match=r"x: must be a size such as 1\.5GB or 900MiB"):
            parse_size("x", text)


def test_the_command(command, capsys):
    assert main(["plan", *command(num_validation_images=1)]) == 0
    *lines, highest = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines] == PARTS
    assert highest.startswith("highest: ") and highest.endswith("for their next outputs")


def test_the_command_tells_typos_and_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "ti", "--sed", "1"])
    assert "did you mean --seed; see persona plan ti --help" in capsys.readouterr().err
    assert main(["plan", "ti"]) == 2
    assert "pretrained_model_name_or_path: must be given" in capsys.readouterr().err
