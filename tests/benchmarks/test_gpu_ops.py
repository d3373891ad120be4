# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from benchmarks import gpu_ops, gpu_peers, gpu_steps, report
from benchmarks.gpu_table import Candidate, Missing

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")


def test_tiny_rows_are_kept_and_reported(tmp_path, capsys, monkeypatch):
    out = tmp_path / "gpu_ops.json"
    quick = [p for p in gpu_peers.PEERS if "quanto" not in p.name]  # which compiles C++ for the CPU
    monkeypatch.setattr(gpu_peers, "PEERS", quick)
    assert gpu_ops.main(["--tiny", "--out", str(out)]) == 0
    tables = json.loads(out.read_text())["tables"]
    assert len(tables) == 4
    for table in tables:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    names = [row[0] for table in tables for row in table["rows"]]
    assert {"w8a8", "w4a16-g64", "torch bf16", "torch._int_mm alone"} <= set(names)
    assert {peer.name for peer in gpu_peers.PEERS} <= set(names)
    assert "Ops on a GPU" in report.section(out)
    assert "qconv2d, tiny" in capsys.readouterr().out


def once(call, device):
    """`timed`, of a call whose time nobody wants."""
    call()
    return 1.0, 1.0, 1.0


def test_tiny_steps_are_kept_and_reported(tmp_path, monkeypatch):
    out = tmp_path / "gpu_steps.json"
    quick = {k: v for k, v in gpu_steps.STACKS.items() if k not in gpu_steps.IN_TURNS}
    monkeypatch.setattr(gpu_steps, "STACKS", quick)
    monkeypatch.setattr(gpu_steps, "timed", once)
    assert gpu_steps.main(["--tiny", "--out", str(out)]) == 0
    forwards, steps = json.loads(out.read_text())["tables"]
    assert [row[0] for row in forwards["rows"]] == list(quick)
    assert all(float(row[4]) < 0.5 for row in forwards["rows"])
    ways = ("CUDA graph", "eager")
    assert [row[0] for row in steps["rows"]] == [
        *(f"ZOODiP, zo_kernels {p}, {how}" for p in ("int8", "int4") for how in ways),
        *(f"ZOSGD on all weights, two forwards, {how}" for how in ways),
    ]
    assert "A UNet and a step on a GPU" in report.section(out)


def test_what_is_not_installed_has_a_row():
    missing = gpu_steps._made("other", lambda: __import__("no_such_library"))
    assert missing.why == "not installed (no_such_library)"


@pytest.mark.parametrize("module", [gpu_ops, gpu_steps])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(module, tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert module.main(["--out", str(out)]) == 0
    assert not out.exists()
    assert "nothing measured: torch finds no GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda layer: __import__("no_such_library"), "not installed (no_such_library)"),
        (lambda layer: torch.ones(2)[5], "fails: index 5 is out of bounds"),
        (lambda layer: lambda x: layer(x) * 2, "is wrong: relative error 1.00"),
        (lambda layer: layer, None),
    ],
)
def test_a_peer_has_a_row_whatever_happens(make, said):
    x, weight = torch.randn(4, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    peer = gpu_peers.Peer("other", 8, "int8", make)
    row = gpu_peers.candidate(peer, weight, torch.zeros(6).bfloat16(), x, 1.0, "int8")
    if said is None:
        assert isinstance(row, Candidate) and row.call().shape == (4, 6)
    else:
        assert isinstance(row, Missing) and row.why.startswith(said)
