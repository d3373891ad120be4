# SPDX-License-Identifier: Apache-2.0
"""The table of the resolution benchmark, and what it answers to a file that cannot be written."""

import pytest

from benchmarks import resolution_mismatch as mismatch


@pytest.fixture
def figures(monkeypatch):
    """Instead of training: figures that tell what was asked for."""
    asked = []

    def run(config, scorer):
        asked.append(config)
        return dict.fromkeys(mismatch.COLUMNS, config.seed + config.min_timestep / 1000)

    monkeypatch.setattr(mismatch, "run", run)
    monkeypatch.setattr(mismatch.Scorer, "default", lambda: None)
    return asked


def test_table(figures, capsys, tmp_path):
    out = tmp_path / "figures.json"
    assert mismatch.main(["--seeds", "0", "2", "--steps", "7", "--output", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + len(mismatch.WINDOWS) * len(mismatch.STRATEGIES)
    assert "bp-high" in lines[-1] and "500-999" in lines[-1] and "1.500 ± 1.414" in lines[-1]
    assert out.exists()
    kinds = [(c.strategy, c.max_train_steps) for c in figures]
    assert kinds[:4] == [("bp-low", 1)] * 2 + [("bp-low", 7)] * 2
    assert figures[0].learning_rate == 1e-30


def test_a_file_that_cannot_be_written(figures, capsys, tmp_path):
    out = tmp_path / "missing" / "figures.json"
    assert mismatch.main(["--output", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("benchmarks.resolution_mismatch: ")
