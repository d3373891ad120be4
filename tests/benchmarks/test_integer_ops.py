# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from benchmarks import integer_candidates as kinds
from benchmarks import integer_ops, peak
from benchmarks.integer_ops import Case
from benchmarks.sd15 import ConvShape, LinearShape
from zo_kernels.ops import use_backend

LINEAR = Case("linear", "linear", 33 * 64 * 128, lambda: kinds.linear(LinearShape(33, 64, 128, 1)))
CONV = Case("conv", "conv", 64 * 32 * 64 * 9, lambda: kinds.conv(ConvShape(8, 64, 32, 3, 1, 1)))
SMALL = Case("small", "small", 3 * 64 * 128, lambda: kinds.small(3, 64, 128, 2))
pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
TOLERANCE = {"w8a8": 0.02, "w4a8": 0.2, "w4a8-g64": 0.15}


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(integer_ops, "LEAST_MS", 0.0)
    monkeypatch.setattr(peak, "ROUNDS", 1000)


@pytest.mark.parametrize("case", [LINEAR, CONV, SMALL], ids=lambda case: case.title)
def test_all_compute_the_same(case):
    rows, disturbed = integer_ops.measure(case, rounds=1, threads=1, top=1.0)
    assert 0 <= disturbed <= 1
    by_name = {row.name: row for row in rows}
    assert set(TOLERANCE) <= set(by_name)
    for row in rows:
        assert 0 < row.min_ms <= row.median_ms <= row.max_ms
        assert row.tops > 0
        if row.error is not None:
            assert row.error < TOLERANCE.get(row.name, 0.02), row
    for name in by_name:
        ours = name.startswith("w")
        assert (by_name[name].backend in ("cpp", "reference")) == ours
    table = integer_ops.text_of(case.title, rows)
    assert table.count("\n") == len(rows) + 4


def test_a_reference_is_never_mistaken_for_a_kernel():
    with use_backend("reference"):
        rows, _ = integer_ops.measure(LINEAR, rounds=3, threads=1, top=1.0)
    ours = [row for row in rows if row.name.startswith("w")]
    assert {row.backend for row in ours} == {"reference"}
    assert all(row.min_ms == row.max_ms for row in ours)  # timed once
    group = {"title": "t", "rows": [vars(row) for row in rows]}
    last = integer_ops.summary([group]).splitlines()[-1]
    assert last.count("*") >= 5


def test_without_vnni(monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "NEEDED", "no_such_flag")
    with pytest.raises(RuntimeError, match="no_such_flag"):
        peak.loops(1)
    rows, _ = integer_ops.measure(LINEAR, rounds=1, threads=1, top=None)
    assert all(row.of_peak is None for row in rows)
    integer_ops.summary([{"title": "t", "rows": [vars(row) for row in rows]}])


def test_noise_moves_the_codes():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(64, 128), torch.zeros(64), torch.randn(4, 128)
    layer = kinds.Ours("qlinear", weight, bias)
    by_name = {c.name: c.call for c in kinds._ours(layer, x)}
    plain, pair = by_name["w8a8"](), by_name[kinds.PAIR]()
    assert pair.shape == (2, *plain.shape)
    assert torch.equal(by_name[kinds.CODES]()[0], pair[0])
    torch.testing.assert_close((pair[0] + pair[1]) / 2, plain)  # +R and -R cancel
    assert not torch.equal(pair[0], plain)


def test_shares_are_of_the_best_peak_of_all_rounds():
    best = peak.operations("int8", 2) / 1e9  # TOPS of a loop that takes 1 ms
    groups = [
        {"rows": [{"name": integer_ops.PEAK, "min_ms": ms, "tops": best / 3}]} for ms in (2.0, 1.0)
    ]
    assert integer_ops.share_of_best(groups, best / 2, 2) == pytest.approx(best)
    assert groups[0]["rows"][0]["of_peak"] == pytest.approx(1 / 3)
    assert integer_ops.share_of_best([], 0.5, 2) == 0.5


@pytest.mark.skipif(peak.unavailable() is not None, reason=str(peak.unavailable()))
def test_peak_runs():
    for loop in peak.loops(1).values():
        loop()
    assert 0 < peak.best("int8", 1, turns=2) < 100


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(integer_ops, "cases", lambda quick, everything: [LINEAR, CONV])
    out = tmp_path / "rows.json"
    assert integer_ops.main(["--quick", "--rounds", "1", "--only", "conv", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert [group["title"] for group in content["groups"]] == ["conv"]
    assert content["command"].startswith("python -m benchmarks.integer_ops --quick")
    assert "**conv**" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        integer_ops.main(["--rounds", "0"])


def test_cases_hold_what_the_unet_computes():
    titles = [case.title for case in integer_ops.cases(quick=False, everything=True)]
    assert len(titles) == len(set(titles))
    assert sum(title.startswith("conv 3x3") for title in titles) > 15
    assert len(integer_ops.cases(quick=True, everything=False)) < 10
