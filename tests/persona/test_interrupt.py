# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C: exit code 130, a checkpoint, and a resume that goes on bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from persona import demo
from persona.cli import main
from persona.methods.textual_inversion import TextualInversion
from persona.train import CHECKPOINT, textual_inversion

TOKEN = "learned_embeds.safetensors"


@pytest.fixture
def straight(options, tmp_path):
    """Tensors of the token and the checkpoint of a run that was not interrupted."""
    folder = tmp_path / "straight"
    textual_inversion(options(output_dir=str(folder)), progress=False)
    return [load_file(folder / name) for name in (TOKEN, CHECKPOINT)]


def equal(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize(
    ("signals", "kept"),
    [(1, "stopped after step 3; go on with --resume"), (2, "a checkpoint that was written stays")],
)
def test_a_resumed_run_ends_in_the_same_bits(
    command, straight, tmp_path, monkeypatch, capsys, signals, kept
):
    """The first waits for the end of the step and saves; the second stops at once."""
    step = TextualInversion.step

    def interrupted(self):
        done = step(self)
        for _ in range(signals if done.step == 3 else 0):
            signal.raise_signal(signal.SIGINT)
        return done

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(TextualInversion, "step", interrupted)
        assert main(command(checkpointing_steps=2)) == 130
    assert kept in capsys.readouterr().err.splitlines()[-1]
    assert signal.getsignal(signal.SIGINT) is handler
    out = tmp_path / "out"
    assert not (out / TOKEN).exists()
    assert load_file(out / CHECKPOINT)["counts"].tolist() == [4 - signals, 0]

    assert main(command("--resume")) == 0
    assert all(
        equal(load_file(out / name), expected)
        for name, expected in zip((TOKEN, CHECKPOINT), straight, strict=True)
    )
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_demo_stops_too(monkeypatch, tmp_path, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Scorer, "default", interrupted)
    assert demo.main(["--output_dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "persona.demo: stopped\n"


@pytest.mark.slow
def test_a_process_says_only_what_is_ours(command, tmp_path):
    """A real SIGINT to a real process; diffusers and transformers add nothing to its output."""
    arguments = command(max_train_steps=1_000_000, checkpointing_steps=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "persona", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (tmp_path / "out" / CHECKPOINT).exists() and process.poll() is None:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        out, error = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert out == ""
    *bar, last = filter(None, error.splitlines())
    assert all(line.startswith("Steps:") for line in bar)
    assert last.startswith("persona: stopped after step")
