# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what a resume refuses, and what a full disk leaves."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from persona.cli import main
from persona.train import CHECKPOINT, textual_inversion

TOKEN = "learned_embeds.safetensors"


def step_of(folder):
    with safe_open(folder / CHECKPOINT, "pt") as file:
        return int(file.metadata()["step"])


@pytest.fixture
def trained(options, tmp_path):
    """The output folder of a run of two steps."""
    textual_inversion(options(max_train_steps=2), progress=False)
    return tmp_path / "out"


@pytest.fixture
def refused(command, capsys, trained):
    """A function: changed options -> the one line that a resume answers; no file changes."""

    def run(**changes):
        before = {path: path.read_bytes() for path in trained.iterdir()}
        assert main(command("--resume", **changes)) == 2
        assert {path: path.read_bytes() for path in trained.iterdir()} == before
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    return run


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("zo_n", 2, 3), ("initializer_token", "toy", "dog"), ("base_precision", "int8", "as-loaded")],
)
def test_a_run_with_other_options_is_not_continued(refused, name, old, new):
    assert refused(**{name: new}) == (
        f"persona: {name}: must be {old!r} as in the checkpoint to resume, got {new!r}; use the "
        "same options or another --output_dir\n"
    )


def damaged(content, how):
    middle = len(content) - 100  # among the numbers
    return {
        "empty": b"",
        "half": content[: len(content) // 2],
        "text": b"not tensors",
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }[how]


@pytest.mark.parametrize("how", ["empty", "half", "text", "one bit"])
def test_a_damaged_checkpoint_is_not_continued(refused, trained, how):
    path = trained / CHECKPOINT
    path.write_bytes(damaged(path.read_bytes(), how))
    line = refused()
    assert line.startswith("persona: resume_from_checkpoint: must be ")
    assert f"got {path} " in line and line.endswith("; start without --resume\n")


def test_other_tensors_are_no_checkpoint(refused, trained):
    path = trained / CHECKPOINT
    path.write_bytes((trained / TOKEN).read_bytes())
    line = refused()
    assert f"of format persona-checkpoint-2, got another file at {path}; start without" in line


def test_no_checkpoint(refused, trained):
    (trained / CHECKPOINT).unlink()
    assert "must find a checkpoint, got none at" in refused()


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    command, options, trained, tmp_path, capsys, monkeypatch
):
    write = Path.write_bytes
    writes = 0

    def fill(self, content):
        nonlocal writes
        writes += CHECKPOINT in self.name
        if writes < 2:
            return write(self, content)
        write(self, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fill)
        assert main(command("--resume", checkpointing_steps=1)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"output_dir: {trained / CHECKPOINT} must be writable to the end, got No space" in line
    assert step_of(trained) == 3
    assert not list(trained.glob(".*"))

    assert main(command("--resume")) == 0
    straight = textual_inversion(options(output_dir=str(tmp_path / "straight")), progress=False)
    expected = load_file(straight.saved)
    assert expected["<sks>"].equal(load_file(trained / TOKEN)["<sks>"])
