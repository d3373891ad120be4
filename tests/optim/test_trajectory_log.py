# SPDX-License-Identifier: Apache-2.0
"""A log that is cut, damaged, continued, or not of the run that it is taken for."""

import struct

import pytest
import torch
from trajectories import BF16, OPTIMIZERS, crash, net, record, same, train

from zo_kernels import _zolog
from zo_kernels.optim import ZOSGD, ZOAdam
from zo_kernels.optim.trajectory import (
    Digest,
    TrajectoryWriter,
    read,
    replay,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.zolog"


@pytest.fixture(params=OPTIMIZERS)
def name(request):
    return request.param


def test_a_log_cut_anywhere_in_its_last_record_opens(path):
    crash(record(path, steps=3, close=False)[1])
    data, log = path.read_bytes(), read(path)
    for end in range(log.entries[-2].end, len(data)):
        path.write_bytes(data[:end])
        assert list(read(path)) == list(log)[:-1]
        path.write_bytes(data[:end] + bytes(50))  # a file system that had grown the file already
        assert list(read(path)) == list(log)[:-1]


def test_no_flipped_byte_of_the_last_record_is_read(path):
    crash(record(path, steps=3, close=False)[1])
    data, log = path.read_bytes(), read(path)
    for at in range(log.entries[-2].end, len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            path.write_bytes(damaged)
            assert list(read(path)) == list(log)[:-1]


def test_damage_before_the_last_record_is_an_error(path):
    crash(record(path, steps=4, close=False)[1])
    data, log = path.read_bytes(), read(path)
    for at in range(log.entries[-2].end):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"read: .* must be .*, got .*; "):
            read(path)


def test_other_files_and_versions_are_refused(path):
    for content in (b"", b"ZOLO", b"PK\x03\x04" * 10):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="read: path must be a log of a trajectory, got"):
            read(path)
    path.write_bytes(_zolog.MAGIC + struct.pack("<II", 2, 0) + bytes(9))
    with pytest.raises(ValueError, match="read: version must be 1, as here, got 2; install"):
        read(path)
    path.write_bytes(_zolog.pack_header({"contract": 9}))
    with pytest.raises(ValueError, match="read: contract must be 1, as here, got 9; install"):
        read(path)


def test_another_base_is_refused(path):
    record(path, steps=2)
    other = net()
    with torch.no_grad():
        other.last.bias[0] += 1
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match=r"replay: last\.bias of the base must be that with SHA"):
        replay(other, path)
    assert all(torch.equal(p, b) for p, b in zip(other.parameters(), before, strict=True))
    with pytest.raises(
        ValueError, match=r"replay: gain must be \('F32', \(\)\), got \('BF16', \(\)\)"
    ):
        replay(net(BF16), path)
    with pytest.raises(ValueError, match="replay: tensors must be such that 'gain' is there"):
        replay({"first.weight": net().first.weight}, path)


@pytest.mark.parametrize("lost", [0, 1, 7])
def test_a_run_that_crashed_is_continued(name, path, lost):
    """From a checkpoint `lost` steps before the crash, which tears a record."""
    kind, defaults = OPTIMIZERS[name]
    whole, _ = record(path.with_name("whole"), name, 20)
    model = net()
    optimizer = kind(model.named_parameters(), **defaults)
    optimizer.log = TrajectoryWriter(path, optimizer, model, fsync_every=4)
    train(model, optimizer, 12 - lost)
    file = path.with_name("checkpoint")
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, lost)
    crash(optimizer)
    with path.open("ab") as log:
        log.write(bytes([1, 18, 0, 0]))

    weights, state = torch.load(file, weights_only=True)
    model = net()
    model.load_state_dict(weights)
    optimizer = kind(model.named_parameters(), **defaults)
    optimizer.load_state_dict(state)
    with TrajectoryWriter(path, optimizer, model) as optimizer.log:
        train(model, optimizer, 8 + lost)
    assert same(model, whole)
    assert path.read_bytes() == path.with_name("whole").read_bytes()
    again = net()
    assert replay(again, path) == 20 and same(again, model)


def test_a_closed_log_is_continued(path):
    model, optimizer = record(path, steps=4)
    optimizer.log = TrajectoryWriter(path, optimizer, model)
    train(model, optimizer, 4)
    optimizer.log.close()
    assert [r.draw for r in read(path) if isinstance(r, Digest)] == [4, 8]
    again = net()
    replay(again, path)
    assert same(again, model)


def test_a_log_that_is_not_of_this_run_is_refused(path):
    model, optimizer = record(path, steps=4)
    shorter = path.with_name("shorter")
    record(shorter, steps=3)
    with pytest.raises(ValueError, match=r"path must be a log of the 4 updates .*, got one of 3"):
        TrajectoryWriter(shorter, optimizer, model)
    with pytest.raises(ValueError, match="optimizer must be 'ZOSGD', as in the log, got 'ZOAdam'"):
        TrajectoryWriter(path, ZOAdam(model.named_parameters()), model)
    with pytest.raises(ValueError, match="seed must be 0, as in the log, got 1"):
        TrajectoryWriter(path, ZOSGD(model.named_parameters(), seed=1), model)
    with pytest.raises(ValueError, match="tensors must be the table of the log, got another"):
        TrajectoryWriter(path, ZOSGD(list(model.named_parameters())[:2]), model)
    with pytest.raises(ValueError, match="weights must be those that the log starts from"):
        TrajectoryWriter(path, ZOSGD(model.named_parameters()), model)
    assert len(list(read(path))) == 6  # none of them has cut it


def test_what_a_log_cannot_hold_is_refused(path):
    model = net(BF16)
    with pytest.raises(ValueError, match=r"probe must be exact, .* got in_place; use"):
        TrajectoryWriter(path, ZOSGD(model.named_parameters(), probe="in_place"))
    with pytest.raises(ValueError, match=r"params must be the model, .* got 7 without a name"):
        TrajectoryWriter(path, ZOSGD(model.parameters()))
    with pytest.raises(ValueError, match=r"optimizer must be one of .*, got Mine"):
        TrajectoryWriter(path, type("Mine", (ZOSGD,), {})(model.named_parameters()))
    model, optimizer = record(path, "adam", steps=2)
    with pytest.raises(ValueError, match="optimizer must be without state for a new log, got some"):
        TrajectoryWriter(path.with_name("new"), optimizer, model)
    assert not path.with_name("new").exists()
    with pytest.raises(ValueError, match="log must be open, and of this optimizer"):
        train(model, optimizer, 1)


def test_a_missed_update_is_an_error(path):
    model, optimizer = record(path, steps=2, close=False)
    log, optimizer.log = optimizer.log, None
    train(model, optimizer, 1)
    optimizer.log = log
    with pytest.raises(ValueError, match=r"log must be a log of the 3 updates before .*, got 2"):
        train(model, optimizer, 1)
    crash(optimizer)
    assert len(list(read(path))) == 3


class Full:
    """A file on a disk that has room for ten bytes more."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        return self.file.write(data[:10])


def test_a_full_disk_leaves_a_whole_log(path):
    model, optimizer = record(path, steps=2, close=False)
    before = path.read_bytes()
    optimizer.log._file = Full(optimizer.log._file)
    with pytest.raises(OSError, match="10 of 27 bytes could be written"):
        train(model, optimizer, 1)
    crash(optimizer)
    assert path.read_bytes() == before


def test_an_error_in_the_block_writes_no_digest(path):
    model = net()
    optimizer = ZOSGD(model.named_parameters())
    log = TrajectoryWriter(path, optimizer, model)
    with pytest.raises(ZeroDivisionError), log as optimizer.log:
        train(model, optimizer, 2)
        raise ZeroDivisionError
    assert not any(isinstance(r, Digest) for r in read(path))
