# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from benchmarks import fewer_forwards, personal_memory
from benchmarks.curve_tables import mean_curves, reached, tables, write_tables
from benchmarks.fewer_forwards import ESTIMATORS, steps_of
from benchmarks.personal_methods import pictures_a_step
from benchmarks.report import section
from persona.config import TextualInversionConfig


def rows():
    made = []
    for name, faster in (("paper", 1), ("default", 4)):
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
    [table] = tables(rows(), list(ESTIMATORS))
    paper, ours = table["rows"]
    assert paper[:3] == ["paper", 1, 3] and paper[-2:] == ["1600", "1600"]
    assert ours[-2:] == ["400", "400"]
    assert ours[4] == "0.2100 +- 0.0100" and ours[5] == "0.5000 +- 0.1000"


def test_a_report_with_its_curves(tmp_path):
    out = tmp_path / "fewer_forwards.jsonl"
    write_tables(out, list(ESTIMATORS), "How to read it.")
    assert not out.with_suffix(".json").exists()
    out.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    write_tables(out, list(ESTIMATORS), "How to read it.")
    assert "| paper | 1 | 3 |" in section(out.with_suffix(".json"))


def test_every_estimator_is_a_recipe():
    for options in ESTIMATORS.values():
        config = TextualInversionConfig(**options, max_train_steps=steps_of(options))
        assert 1500 < pictures_a_step({"command": "ti", **options}) * config.max_train_steps <= 1536


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--estimators", "magic"], "estimators: must be among"), (["--seeds", "x"], "seeds: must")],
)
def test_bad_arguments(capsys, tmp_path, arguments, told):
    given = ["--subjects", str(tmp_path / "none.npz"), "--out", str(tmp_path / "rows.jsonl")]
    assert fewer_forwards.main([*given, *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["inference-int4", "zoodip-int8", "tuneqdm-zo", "selective-bp-low"]
)
def test_memory_of_a_tiny_model(name):
    at = personal_memory.measure(name, "tiny")
    assert at["imported"] > 0 and at["loaded"] <= at["peak"]
    [line] = personal_memory.table({name: at})["rows"]
    assert line[0] == personal_memory.CASES[name].title


def test_a_method_that_there_is_not(capsys, tmp_path):
    out = str(tmp_path / "memory.json")
    assert personal_memory.main(["--methods", "magic", "--out", out]) == 2
    assert "methods: must be among inference-int8" in capsys.readouterr().err
