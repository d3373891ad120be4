# SPDX-License-Identifier: Apache-2.0
"""The choice of tiles by timing and the file that keeps it, with a timer that needs no GPU."""

import json
import logging
from typing import NamedTuple

import pytest
import torch

from zo_kernels import _env

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from zo_kernels.kernels import _tuning, qattention
from zo_kernels.kernels._attention import KEYS
from zo_kernels.kernels._tiles import Tiles, options, tiles
from zo_kernels.kernels._tuning import Tuner, tuned

MACHINE = {"gpu": "one", "capability": "9.0", "triton": "3.6.0"}


class Cut(NamedTuple):
    m: int
    n: int


DEFAULT = Cut(32, 32)
OPTIONS = {"m": (16, 32, 64, 128), "n": (16, 32, 64)}


class Timer:
    """Seconds of a call are what the call returns; counts them."""

    def __init__(self):
        self.calls = 0

    def __call__(self, call):
        self.calls += 1
        return call()


def cost(cut):
    """Least at (128, 16)."""
    return abs(cut.m - 128) + cut.n


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.WARNING, logger="zo_kernels")
    return caplog


@pytest.fixture
def file(tmp_path):
    return tmp_path / "folder" / "tiles.json"


def test_the_fastest_is_found_once_and_kept(file, log):
    timer = Timer()
    tuner = Tuner(file, MACHINE, timer)
    assert tuner.choose("a", DEFAULT, OPTIONS, cost) == (128, 16)
    timed = timer.calls
    assert 0 < timed <= 1 + 2 * (4 + 3)
    assert tuner.choose("a", DEFAULT, OPTIONS, cost) == (128, 16)
    again = Tuner(file, MACHINE, timer)
    kept = again.choose("a", DEFAULT, OPTIONS, cost)
    assert kept == (128, 16) and type(kept) is Cut
    assert timer.calls == timed and not log.records
    assert again.choose("b", DEFAULT, OPTIONS, lambda cut: -cost(cut)) != (128, 16)
    assert json.loads(file.read_text()).keys() == {"machine", "tiles"}


def test_the_default_stays_where_nothing_is_faster(file):
    assert Tuner(file, MACHINE, Timer()).choose("a", DEFAULT, OPTIONS, lambda _: 1.0) == DEFAULT


def test_what_does_not_fit_the_gpu_is_left_out(file):
    def run(cut):
        if cut.m > 64:
            raise OutOfResources(1, 0, "shared memory")
        return cost(cut)

    assert Tuner(file, MACHINE, Timer()).choose("a", DEFAULT, OPTIONS, run) == (64, 16)


def test_two_processes_keep_what_both_found(file):
    first, second = Tuner(file, MACHINE, Timer()), Tuner(file, MACHINE, Timer())
    first.choose("a", DEFAULT, OPTIONS, cost)
    second.choose("b", DEFAULT, OPTIONS, cost)
    assert json.loads(file.read_text())["tiles"].keys() == {"a", "b"}


@pytest.mark.parametrize(
    "text",
    [
        '{"machine": {"gpu": "on',
        "[]",
        "{}",
        json.dumps({"machine": MACHINE, "tiles": {"a": ["128", 16]}}),
        json.dumps({"machine": MACHINE, "tiles": {"a": 3}}),
        json.dumps({"machine": MACHINE | {"triton": "3.5.0"}, "tiles": {"a": [16, 16]}}),
        b"\xff\xfe",
    ],
)
def test_torn_and_foreign_files_are_ignored_and_replaced(file, log, text):
    file.parent.mkdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    tuner = Tuner(file, MACHINE, Timer())
    assert len(log.records) == 1 and "ignored" in log.messages[0]
    assert tuner.choose("a", DEFAULT, OPTIONS, cost) == (128, 16)
    log.clear()
    assert Tuner(file, MACHINE, Timer()).known("a", DEFAULT, OPTIONS) == (128, 16)
    assert not log.records


@pytest.mark.parametrize("kept", [[128], [128, 17], [128, 16, 1]])
def test_tiles_that_a_kernel_can_not_have_are_found_anew(file, log, kept):
    file.parent.mkdir()
    file.write_text(json.dumps({"machine": MACHINE, "tiles": {"a": kept, "unknown": [1]}}))
    tuner = Tuner(file, MACHINE, Timer())
    assert tuner.choose("a", DEFAULT, OPTIONS, cost) == (128, 16)
    assert "none that it can have" in log.messages[0]
    assert json.loads(file.read_text())["tiles"] == {"a": [128, 16], "unknown": [1]}


def test_a_folder_that_can_not_be_written_costs_the_file_alone(tmp_path, log):
    (tmp_path / "folder").write_text("a file")
    tuner = Tuner(tmp_path / "folder" / "tiles.json", MACHINE, Timer())
    assert tuner.choose("a", DEFAULT, OPTIONS, cost) == (128, 16)
    assert "tiles are not kept" in log.messages[-1]


def test_only_who_asks_is_tuned(file, monkeypatch):
    asked = []
    tuner = Tuner(file, MACHINE, Timer())
    monkeypatch.setattr(_tuning, "_tuner", lambda index: tuner)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def call():
        more = (
            {"rows": 4, "bits": 8},
            DEFAULT,
            lambda: OPTIONS,
            lambda cut: asked.append(cut) or 0.0,
        )
        return tuned("qlinear", *more, torch.device("cuda", 0))

    monkeypatch.delenv("ZO_AUTOTUNE", raising=False)
    assert call() == DEFAULT and not asked
    monkeypatch.setenv("ZO_AUTOTUNE", "1")
    capturing = True  # a CUDA graph: nothing may be timed
    assert call() == DEFAULT and not asked
    capturing = False
    call()
    assert asked and list(json.loads(file.read_text())["tiles"]) == ["qlinear rows=4 bits=8"]


def test_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ZO_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="ZO_AUTOTUNE: it must be 0 or 1, got 'yes'"):
        _env.autotune()
    monkeypatch.setenv("ZO_CACHE", str(tmp_path))
    assert _env.cache() == tmp_path


@pytest.mark.parametrize("groups", [1, 5, 20])
@pytest.mark.parametrize("heavy", [False, True])
def test_options_are_tiles(groups, heavy):
    found = options(1, 640, groups, heavy=heavy, splittable=True)
    assert set(found) == set(Tiles._fields)
    default = tiles(
        64, 640, 1, 640, groups, integer=False, heavy=heavy, splittable=True
    )  # fmt: skip
    assert all(value in found[name] for name, value in default._asdict().items())
    assert all(640 // groups % k == 0 for k in found["k"] if groups > 1)
    assert set(qattention.OPTIONS) == set(qattention.Tiles._fields)
    assert all(KEYS % n == 0 for n in qattention.OPTIONS["n"])
