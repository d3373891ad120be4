# SPDX-License-Identifier: Apache-2.0
import json
import os

import pytest
import torch

from benchmarks import gpu_noise, gpu_table, report

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")


def test_tiny_rows_are_kept_and_reported(tmp_path, capsys):
    out = tmp_path / "gpu_noise.json"
    assert gpu_noise.main(["--tiny", "--out", str(out)]) == 0
    tables = json.loads(out.read_text())["tables"]
    assert len(tables) == 7
    for table in tables:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    names = {row[0] for table in tables for row in table["rows"]}
    assert {"add_noise_ normal", "MeZO's loop", "FZOO's loop", "GraphedStep", "zo_adam_"} <= names
    assert "The noise engine on a GPU" in report.section(out)
    assert "noise, 5 tensors" in capsys.readouterr().out


def test_the_switch_to_cpp_is_put_back(monkeypatch):
    monkeypatch.setenv("ZO_CUDA_CPP", "0")
    seen = []
    gpu_table.by_cpp(lambda: seen.append(os.environ["ZO_CUDA_CPP"]))()
    assert seen == ["1"] and os.environ["ZO_CUDA_CPP"] == "0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    out = tmp_path / "gpu_noise.json"
    assert gpu_noise.main(["--out", str(out)]) == 0
    assert not out.exists()
    assert "nothing measured: torch finds no GPU" in capsys.readouterr().out
