# SPDX-License-Identifier: Apache-2.0
"""A log and the base give the weights of the run, to the bit, wherever they are replayed."""

import hashlib
import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trajectories import (
    BF16,
    OPTIMIZERS,
    STEPS,
    crash,
    net,
    record,
    same,
    tensors,
    train,
)

from zo_kernels import _native
from zo_kernels._registry import use_backend
from zo_kernels.optim import ZOSGD, ZOAdam, _grid
from zo_kernels.optim.trajectory import (
    Digest,
    Quanta,
    Step,
    Trained,
    TrajectoryWriter,
    read,
    replay,
)
from zo_kernels.replay import main, replay_file

PROBES = {
    "snapshot": (torch.float32, {"probe": "snapshot", "n": 2}),
    "in_place": (torch.float32, {"probe": "in_place"}),
    "keep_perturbed": (torch.float32, {"probe": "in_place", "keep_perturbed": True}),
    "bf16": (BF16, {"probe": "virtual", "estimator": "one_sided", "kind": "rademacher"}),
    "fp16": (torch.float16, {"probe": "snapshot"}),
}


def groups_of(model):
    named = list(model.named_parameters())
    return [{"params": named[:3], "eps": 0.02, "lr": 0.001}, {"params": named[3:]}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.zolog"


RUNS = [(name, probe) for name in OPTIMIZERS for probe in PROBES]


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def run(request, tmp_path_factory):
    """A run of every optimizer with every probe, two groups, a schedule and rejected steps."""
    name, probe = request.param
    dtype, settings = PROBES[probe]
    kind, defaults = OPTIMIZERS[name]
    folder = tmp_path_factory.mktemp("run")
    path, model = folder / "run.zolog", net(dtype)
    optimizer = kind(groups_of(model), **(defaults | settings | {"seed": 2**62 + 3}))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    with TrajectoryWriter(path, optimizer, model) as optimizer.log:
        train(model, optimizer, STEPS, schedule, broken=(0, 7))
    assert optimizer.rejected == 2 and not same(model, net(dtype))
    return SimpleNamespace(model=model, dtype=dtype, path=path, folder=folder)


@pytest.fixture
def isa_afterwards():
    binding = _native.binding()
    before = binding and binding.cpu_isa()
    yield binding
    if binding:
        binding.set_isa(before)


def test_replay_has_the_bits_of_the_run(run, isa_afterwards):
    again = net(run.dtype)
    assert replay(again, run.path) == STEPS - 2
    assert same(again, run.model)
    with use_backend("reference"):
        again = net(run.dtype)
        replay(again, run.path)
    assert same(again, run.model)
    for isa in isa_afterwards.cpu_isas_available() if isa_afterwards else ():
        isa_afterwards.set_isa(isa)
        again = net(run.dtype)
        replay(again, run.path)
        assert same(again, run.model), isa


def test_five_hundred_steps_replay_on_another_isa_and_in_numpy(tmp_path, path, isa_afterwards):
    """The digests of the files are equal, and so are those of the trained weights."""
    model, _ = record(path, "adam", steps=500)
    base, digests = tmp_path / "base.safetensors", set()
    save_file(tensors(net()), base)
    save_file(tensors(model), tmp_path / "trained.safetensors")
    if isa_afterwards:
        isa_afterwards.set_isa("scalar")
    for engine in ("torch", "numpy"):
        out = tmp_path / f"{engine}.safetensors"
        assert replay_file(base, path, out, engine=engine) == 500
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
        found, wanted = load_file(out), load_file(tmp_path / "trained.safetensors")
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert len(digests) == 1


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_files_have_the_bits_of_the_run(run, engine):
    base, out = run.folder / "base.safetensors", run.folder / "out.safetensors"
    save_file(tensors(net(run.dtype)), base, metadata={"who": "me"})
    assert replay_file(base, run.path, out, engine=engine) == STEPS - 2
    found, wanted = load_file(out), tensors(run.model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"who": "me"}


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["safetensors"] = None
from zo_kernels.replay import main
code = main(sys.argv[1:])
assert not [m for m in sys.modules if m.startswith("torch.")]
raise SystemExit(code)
"""


@pytest.mark.parametrize("run", [("sgd", "keep_perturbed"), ("adam", "bf16")], indirect=True)
def test_without_torch(run):
    base, out = run.folder / "base.safetensors", run.folder / "out.safetensors"
    save_file(tensors(net(run.dtype)), base)
    arguments = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, base, run.path, out]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{STEPS - 2} updates, {out}\n"
    wanted = tensors(run.model)
    assert all(torch.equal(p, wanted[key]) for key, p in load_file(out).items())


def test_a_step_takes_few_bytes(path):
    crash(record(path, "adam", close=False)[1])
    log = read(path)
    assert log.end - log.entries[0].end == 27 * STEPS  # the first entry says what is trained
    assert path.stat().st_size == log.end


def test_a_step_with_a_schedule_takes_few_bytes(path):
    model = net()
    optimizer = ZOAdam(groups_of(model), lr=0.02)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    optimizer.log = TrajectoryWriter(path, optimizer)
    train(model, optimizer, schedule=schedule)
    crash(optimizer)
    log = read(path)
    lengths = {b.end - a.end for a, b in zip(log.entries[1:], log.entries[2:], strict=False)}
    assert max(lengths) == 27 + 8 + 2 * 11 <= 64


def test_until_is_a_checkpoint_of_every_step(path):
    model, saved = net(), {}
    optimizer = ZOAdam(model.named_parameters(), lr=0.02, n=2, probe="in_place")
    with TrajectoryWriter(path, optimizer, model) as optimizer.log:
        for _ in range(6):
            train(model, optimizer, 1, broken=[0] if optimizer.draw == 4 else [])
            saved[optimizer.draw] = {k: v.clone() for k, v in model.state_dict().items()}
    for draw, weights in saved.items():
        again = net()
        replay(again, path, until=draw)
        assert all(torch.equal(v, weights[k]) for k, v in again.state_dict().items()), draw


@pytest.mark.parametrize("probe", ["snapshot", "in_place"])
def test_parameters_that_thaw_and_grids_that_grow(path, monkeypatch, probe):
    monkeypatch.setattr(_grid, "RECHECK", 1)
    model = net()
    model.last.requires_grad_(False)
    optimizer = ZOAdam(model.named_parameters(), lr=0.02, probe=probe)
    with TrajectoryWriter(path, optimizer, model) as optimizer.log:
        train(model, optimizer, 8)
        model.last.requires_grad_()
        model.gain.requires_grad_(False)
        train(model, optimizer, 8, broken=[0])
        optimizer.param_groups[0]["lr"] = 0.2  # outgrows every grid
        train(model, optimizer, 8)
    records = list(read(path))
    assert sum(isinstance(r, Trained) for r in records) == 2
    grids = sum(isinstance(r, Quanta) for r in records)
    assert grids > 2 if probe == "in_place" else not grids
    assert isinstance(records[-1], Digest)
    again = net()
    replay(again, path)
    assert same(again, model)


def test_steps_carry_what_the_update_got(path):
    record(path, "momentum", steps=2)
    first, second = (r for r in read(path) if isinstance(r, Step))
    assert (first.draw, second.draw) == (0, 1) and not first.settings
    header = read(path).header
    assert header["groups"] == [{"lr": 0.001, "momentum": 0.5, "weight_decay": 0.1}]
    assert header["tensors"][2] == {
        "names": ["first.weight", "twin.weight"],
        "shape": [7, 5],
        "dtype": "F32",
        "stream": ZOSGD(net().named_parameters()).param_groups[0]["streams"][2],
        "group": 0,
        "sha256": header["tensors"][2]["sha256"],
    }


def test_weights_that_something_else_changed_are_noticed(path):
    model = net()
    optimizer = ZOSGD(model.named_parameters(), lr=0.02)
    with TrajectoryWriter(path, optimizer, model) as optimizer.log:
        train(model, optimizer, 3)
        model.last.bias.data[0] += 1
    with pytest.raises(ValueError, match=r"replay: weights must be those with SHA-256 .* draw 3"):
        replay(net(), path)


def test_both_names_of_a_tied_tensor_are_written(path):
    model, _ = record(path, steps=5)
    again = {name: p.clone() for name, p in net().state_dict().items()}
    replay(again, path)
    assert all(torch.equal(p, again[name]) for name, p in model.state_dict().items())


def test_command(path, capsys):
    model, _ = record(path, steps=5)
    base, out = path.with_name("base.safetensors"), path.with_name("out.safetensors")
    save_file(tensors(net()) | {"buffer": torch.arange(5)}, base)
    arguments = [str(base), str(path), str(out)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"5 updates, {out}\n"
    found = load_file(out)
    assert torch.equal(found.pop("buffer"), torch.arange(5))
    assert all(torch.equal(p, found[name]) for name, p in tensors(model).items())
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~umask
    assert main([*arguments, "--until", "2"]) == 0
    assert capsys.readouterr().out == f"2 updates, {out}\n"


def test_command_says_what_is_wrong_and_leaves_the_file(path, capsys):
    record(path, steps=2)
    base, out = path.with_name("base.safetensors"), path.with_name("out.safetensors")
    save_file(tensors(net()), base)
    out.write_bytes(b"older")
    wrong = path.with_name("wrong.safetensors")
    save_file({name: p + 1 for name, p in tensors(net()).items()}, wrong)
    for first in (wrong, path, path.with_name("missing")):
        assert main([str(first), str(path), str(out)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert out.read_bytes() == b"older"
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "base.safetensors",
        "out.safetensors",
        "run.zolog",
        "wrong.safetensors",
    ]


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_tensors_at_odd_addresses(path, engine):
    model, _ = record(path, steps=3)
    base, out = path.with_name("base.safetensors"), path.with_name("out.safetensors")
    save_file(tensors(net()), base)
    data = base.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head, rest = data[8 : 8 + length], data[8 + length :]
    base.write_bytes((length + 1).to_bytes(8, "little") + head + b" " + rest)
    replay_file(base, path, out, engine=engine)
    found = load_file(out)
    assert all(torch.equal(p, found[name]) for name, p in tensors(model).items())
