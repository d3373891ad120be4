# SPDX-License-Identifier: Apache-2.0
"""Slopes against difference quotients, figures of known signals, and the command on few probes."""

import json

import pytest
import torch

from benchmarks import charts, rounding_noise, rounding_probes
from persona.demo import ASSETS


@pytest.fixture(scope="module")
def scene():
    return rounding_probes.setting(
        str(ASSETS / "tiny-sd"), ASSETS / "demo", ("w8", "w8a8"), batches=1, batch=1
    )


@pytest.mark.parametrize(
    ("probe", "eps"), [("token", 1e-3), ("scale_relative", 1e-3), ("weight", 0.1)]
)
def test_backpropagation_and_difference_quotient_agree(scene, probe, eps):
    subjects, (batch,) = scene
    draws = [3, 5]
    slopes = rounding_probes.slopes(subjects["w8"], probe, draws, batch)
    plus, minus = (
        subjects["w8"].losses(probe, draws, [sign * eps] * 2, batch) for sign in (1.0, -1.0)
    )
    error = (plus - minus) / (2 * eps) - slopes
    assert float(error.norm() / slopes.norm()) < 0.05


def test_codes_are_weights_in_whole_steps(scene):
    subjects, (batch,) = scene
    both = [subjects["w8a8"].losses(probe, [7], [2.0], batch) for probe in ("weight", "codes")]
    torch.testing.assert_close(*both, rtol=1e-5, atol=0.0)


def test_the_float_twin_computes_the_same(scene):
    subjects, (batch,) = scene
    unet = subjects["w8"].family.pipe.unet
    twin = rounding_probes.float_twin(unet, subjects["w8"].float_unet)
    with torch.no_grad():
        hidden = subjects["w8"].family.encode_tokens(batch.ids)
        outputs = [net(batch.x_t, batch.t, hidden).sample for net in (unet, twin)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_agreement_of_known_signals():
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(4, 500, generator=generator, dtype=torch.float64)
    noise = 0.5 * torch.randn(4, 500, generator=generator, dtype=torch.float64)
    found = rounding_noise.agreement(signal + noise, signal)
    assert found["signal_rms"] == pytest.approx(1, abs=0.05)
    assert found["snr"] == pytest.approx(2, abs=0.15)
    assert found["correlation"] == pytest.approx(1.25**-0.5, abs=0.02)
    assert 0.8 < found["sign_agreement"] < 0.9  # 1 - atan(1/2) / pi = 0.85
    assert rounding_noise.agreement(signal, signal)["sign_agreement"] == 1


def test_safe_from_is_the_start_of_the_last_stretch():
    assert rounding_noise.safe_from([(1, 9.0), (0.1, 4.0), (0.01, 2.0), (0.001, 5.0)]) == 0.1
    assert rounding_noise.safe_from([(1, 2.0), (0.1, 4.0)]) is None
    assert rounding_noise.safe_from([(1, float("nan"))]) is None


def test_a_chart_leaves_out_what_has_no_logarithm():
    lines = [charts.Line("a", [(1e-3, 0.5), (1e-2, 0.0), (1.0, float("inf"))])]
    panels = [charts.Panel("title", "x", lines, level=3.0), charts.Panel("empty", "x", [])]
    panels.append(charts.Panel("named points", "x", lines, log="", joined=False))
    picture = charts.draw(panels)
    assert picture.size == (round(3 * charts.WIDTH * charts.DPI), charts.HEIGHT * charts.DPI)
    assert len(picture.getcolors(1 << 20)) > 2


def test_command_keeps_the_probes_of_earlier_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounding_noise, "EPS", {"token": (1e-2, 1e-1, 0.2, 0.3), "codes": (1.0,)})
    out = tmp_path / "figures.json"
    few = ["--minibatches", "1", "--directions", "2", "--batch", "1", "--out", str(out)]
    assert rounding_noise.main(["--probes", "codes", *few]) == 0
    assert rounding_noise.main(["--probes", "token", "--fp32", *few]) == 0
    figures = json.loads(out.read_text())
    assert set(figures["probes"]) == {"token", "codes"}
    row = figures["probes"]["token"]["rows"][1]
    assert row["two_sided"]["correlation"] > 0.9
    assert row["fp32_two_sided"]["snr"] > 1
    assert figures["probes"]["codes"]["rows"][0]["loss_noise"] > 0
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "**token**" in capsys.readouterr().out


def test_command_refuses_unknown_probes(capsys):
    assert rounding_noise.main(["--probes", "bias"]) == 2
    assert "probes must be of" in capsys.readouterr().err
