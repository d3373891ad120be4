# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch

from benchmarks import fewer_forwards, lockstep, personal_memory
from benchmarks.curve_tables import mean_curves, reached, tables, write_tables
from benchmarks.fewer_forwards import ESTIMATORS, POINTS, Job, steps_of
from benchmarks.personal_methods import pictures_a_step
from benchmarks.personal_subjects import read_subjects
from benchmarks.report import section
from persona.base import load_base
from persona.config import RunConfig, TextualInversionConfig
from persona.data import load_folder
from persona.methods.textual_inversion import TextualInversion


def rows():
    made = []
    for name, faster in (("paper", 1), ("shaped by the vocabulary", 4)):
        for seed in range(3):
            curve = [
                {"pictures": x // faster, "trained_loss": 0.3, "held_out_loss": loss + seed / 100}
                for x, loss in ((0, 0.5), (400, 0.4), (1600, 0.2))
            ]
            curve[-1]["fidelity"] = 0.4 + seed / 10
            made.append({"estimator": name, "subject": "rose", "seed": seed, "curve": curve})
    return made


def test_where_a_curve_meets_a_level():
    curve = [(0, 1.0), (100, 0.5), (200, 0.75), (400, 0.25)]
    assert reached(curve, 0.75) == 50 and reached(curve, 0.5) == 100
    assert reached(curve, 0.3) == pytest.approx(380) and reached(curve, 0.2) is None


def test_the_table_counts_pictures_to_the_papers_loss():
    assert mean_curves(rows(), "held_out_loss")["paper"][-1] == (1600, pytest.approx(0.21))
    table, *_ = tables(rows(), list(ESTIMATORS))
    paper, ours = table["rows"]
    assert paper[:3] == ["paper", 1, 3] and paper[-3:] == ["1600"] * 3
    assert ours[-3:] == ["400", "not reached", "400"]  # the trained loss never falls
    assert ours[4] == "0.2100 +- 0.0100" and ours[5] == "0.5000 +- 0.1000"


def test_differences_are_of_the_same_subject_and_seed():
    shifted = [row | {"curve": [*row["curve"][:-1], dict(row["curve"][-1])]} for row in rows()]
    for row in shifted:
        if row["estimator"] != "paper":
            row["curve"][-1]["held_out_loss"] -= 0.1 + row["seed"] / 100
    alone = shifted[0] | {"seed": 9, "estimator": "released code"}
    _, against, _ = tables([*shifted, alone], list(ESTIMATORS))
    [line] = against["rows"]
    assert line[:2] == ["shaped by the vocabulary", 3] and line[2] == "+0.0000 +- 0.0000"
    assert line[3] == f"-0.1100 +- {0.01 / 3**0.5:.4f}"


def test_fidelity_of_a_part_of_the_budget_is_held_against_the_papers_at_its_end():
    *_, early = tables(rows(), list(ESTIMATORS))
    assert early["rows"] == [
        ["paper", 3, "-", "-", "+0.0000 +- 0.0000"],
        ["shaped by the vocabulary", 3, "-", "+0.0000 +- 0.0000", "-"],  # 400 of 1600
    ]


def test_a_report_with_its_curves(tmp_path):
    out = tmp_path / "fewer_forwards.jsonl"
    write_tables(out, list(ESTIMATORS), "How to read it.")
    assert not out.with_suffix(".json").exists()
    out.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    write_tables(out, list(ESTIMATORS), "How to read it.")
    assert "| paper | 1 | 3 |" in section(out.with_suffix(".json"))


def test_every_estimator_is_a_recipe():
    for options in ESTIMATORS.values():
        config = TextualInversionConfig(**options | {"max_train_steps": steps_of(options)})
        pictures = pictures_a_step({"command": "ti", **options}) * config.max_train_steps
        assert 0.9 * POINTS[-1] < pictures <= POINTS[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--estimators", "magic"], "estimators: must be among"), (["--seeds", "x"], "seeds: must")],
)
def test_bad_arguments(capsys, tmp_path, arguments, told):
    given = ["--subjects", str(tmp_path / "none.npz"), "--out", str(tmp_path / "rows.jsonl")]
    assert fewer_forwards.main([*given, *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["inference-int4", "zoodip-int8", "tuneqdm-zo", "selective"])
def test_memory_of_a_tiny_model(name):
    at = personal_memory.measure(name, "tiny")
    assert at["imported"] > 0 and at["loaded"] <= at["peak"]
    [line] = personal_memory.table({name: at})["rows"]
    assert line[0] == personal_memory.CASES[name].title


def test_a_method_that_there_is_not(capsys, tmp_path):
    out = str(tmp_path / "memory.json")
    assert personal_memory.main(["--methods", "magic", "--out", out]) == 2
    assert "methods: must be among inference-int8" in capsys.readouterr().err


def test_runs_in_lockstep_learn_what_they_learn_alone(subjects_file, tmp_path):
    first, second, *_ = read_subjects(subjects_file, lambda word: True)
    options = ESTIMATORS["paper"] | {"max_train_steps": 3}
    jobs = [
        Job("", "paper", s, seed, options, ()) for s, seed in ((first, 0), (second, 0), (first, 1))
    ]

    def train(some):
        family = load_base(RunConfig(pretrained_model_name_or_path="persona/assets/tiny-sd"))
        runs = []
        for i, job in enumerate(some):
            config = TextualInversionConfig(
                train_data_dir=str(job.subject.write(tmp_path / f"{job.subject.name}-{job.seed}")),
                placeholder_token=f"<subject-{i}>",
                initializer_token=job.subject.word,
                seed=job.seed,
                **options,
            )
            runs.append(
                TextualInversion(
                    family, config, load_folder(Path(config.train_data_dir), resolution=64)
                )
            )
        start = runs[0].theta.clone()
        for _ in range(3):
            lockstep.step(runs)
        assert all(run.steps == 3 and run.rejected == 0 for run in runs)
        assert (runs[0].theta - start).abs().max() > 1e-3
        return [run.theta for run in runs]

    for job, theta in zip(jobs, train(jobs), strict=True):
        [alone] = train([job])
        torch.testing.assert_close(theta, alone, atol=2e-3, rtol=0.0)
