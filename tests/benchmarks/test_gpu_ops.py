# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from benchmarks import gpu_ops, report

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")


def test_tiny_rows_are_kept_and_reported(tmp_path, capsys):
    out = tmp_path / "gpu_ops.json"
    assert gpu_ops.main(["--tiny", "--out", str(out)]) == 0
    tables = json.loads(out.read_text())["tables"]
    assert len(tables) == 4
    for table in tables:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    names = [row[0] for table in tables for row in table["rows"]]
    assert {"w8a8", "w4a16-g64", "torch bf16", "torch._int_mm alone"} <= set(names)
    assert "Ops on a GPU" in report.section(out)
    assert "qconv2d, tiny" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    out = tmp_path / "gpu_ops.json"
    assert gpu_ops.main(["--out", str(out)]) == 0
    assert not out.exists()
    assert "nothing measured: torch finds no GPU" in capsys.readouterr().out
