# SPDX-License-Identifier: Apache-2.0
"""Files are there whole or not at all, with the rights of any other new file."""

import errno
import os
import resource
import stat
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from persona.errors import UserError
from persona.files import (
    append_text,
    make_folder,
    write_bytes,
    write_image,
    write_json,
    write_tensors,
)
from persona.report import MetricsLog

FULL = r"output_dir: \S+ must be writable to the end, got {reason}; free some space"
WRITERS = {
    "tensors": lambda path: write_tensors(path, {"x": torch.ones(1000)}, {"a": "b"}),
    "json": lambda path: write_json(path, ["text"] * 1000),
    "image": lambda path: write_image(path, Image.effect_noise((64, 64), 100)),
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@contextmanager
def file_size_limit(size):
    """The disk takes the first ``size`` bytes of a file and refuses the rest."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def refuse(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@every_writer
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_rights_are_those_of_the_umask(tmp_path, write, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["file"]


@every_writer
def test_a_disk_that_fills_up_leaves_the_old_file_or_none(tmp_path, write):
    (tmp_path / "old").write_text("old")
    with file_size_limit(100):
        for name in ("old", "new"):
            with pytest.raises(UserError, match=FULL.format(reason="File too large")):
                write(tmp_path / name)
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize("fail", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_the_old_file(tmp_path, monkeypatch, fail):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, fail, refuse)
    with pytest.raises(UserError, match=FULL.format(reason="No space left on device")):
        write_bytes(path, b"new")
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_tensors_and_their_header_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    x = torch.arange(6.0).view(2, 3)
    write_tensors(path, {"x": x.T.requires_grad_()}, {})
    assert torch.equal(load_file(path)["x"], x.T)


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "log"
    append_text(path, "1\n")
    with (
        file_size_limit(5),
        pytest.raises(UserError, match=FULL.format(reason="File too large")),
    ):
        append_text(path, "a line too long\n")
    append_text(path, "2\n")
    assert path.read_text() == "1\n2\n"


def test_metrics_drop_what_a_crash_tore_and_what_a_resume_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, keep_below=1)
    for step in (1, 2, 3):
        log.write(step=step, loss=float("nan"))
    append_text(path, '{"step": 4, "lo')
    MetricsLog(path, keep_below=3)
    assert path.read_text() == '{"step": 1, "loss": null}\n{"step": 2, "loss": null}\n'


def test_a_folder_that_is_none_or_takes_no_files(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"output_dir: must be a folder .*file.*; choose"):
            make_folder(path)
    make_folder(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: refuse())
    with pytest.raises(UserError, match=r"output_dir: must be .* \(No space left on device\)"):
        make_folder(tmp_path)
