# SPDX-License-Identifier: Apache-2.0
"""Two ranks train as one process does, to the bit, and none hangs or diverges when one fails.

This file is also the program of the ranks, which write what they find as JSON.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from zo_kernels.distributed import assert_in_sync, data_parallel, weights_hash
from zo_kernels.optim import ZOSGD, ZOAdam

STEPS = 200
TIMEOUT = 10  # seconds that a rank waits for one that may be dead
START = timedelta(minutes=2)  # for one that may be slow
CASES = {  # share -> the optimizer
    "directions": (ZOAdam, {"lr": 0.02, "n": 2, "estimator": "one_sided"}),  # 3 over 2 ranks
    "data": (ZOSGD, {"lr": 0.005, "momentum": 0.5, "probe": "in_place"}),
}


def build(share, dtype=torch.float32, **arguments):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    kind, settings = CASES[share]
    return net, kind(net.named_parameters(), **(settings | arguments))


def loss_of(net, step, part):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2 * step + part))
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def train(share, parts):
    """The hash after STEPS steps, each on the mean over the batches `parts`; and its losses."""
    net, optimizer = build(share)
    if dist.is_initialized():
        data_parallel(optimizer, share)

    def closure():
        return sum(loss_of(net, step, part).double() for part in parts) / len(parts)

    losses = []
    for step in range(STEPS):  # noqa: B007  (the closure reads it)
        losses.append(optimizer.step(closure))
    if dist.is_initialized():
        assert_in_sync(optimizer)
    return [weights_hash(optimizer), losses]


def error_of(action, *arguments):
    try:
        action(*arguments)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def rejected(rank, share):
    """Whether a NaN of rank 1 rejected the step here, and the weights are as before it."""
    net, optimizer = build(share)
    data_parallel(optimizer, share)
    optimizer.step(lambda: loss_of(net, 0, 0))
    before = weights_hash(optimizer)
    optimizer.step(lambda: loss_of(net, 1, 0) * (math.nan if rank == 1 else 1.0))
    return [optimizer.rejected, weights_hash(optimizer) == before]


def diverged(rank):
    """What is said of a step that only rank 1 has made, and of a weight that only it changed."""
    net, optimizer = build("data")
    data_parallel(optimizer, "data")
    optimizer.draw = rank
    step = error_of(optimizer.step, lambda: loss_of(net, 0, 0))
    optimizer.draw = 0
    with torch.no_grad():
        net[0].bias[0] += rank
    return [step, error_of(assert_in_sync, optimizer)]


def refusals(rank):
    return {
        "seed": error_of(data_parallel, build("data", seed=5 * rank)[1]),
        "lr": error_of(data_parallel, build("data", lr=0.5 + rank)[1]),
        "share": error_of(data_parallel, build("data")[1], "rows"),
        "drift": error_of(data_parallel, build("data", torch.bfloat16)[1], "directions"),
    }


def ranks(folder):
    """Run by torchrun."""
    dist.init_process_group("gloo", timeout=START)
    rank = dist.get_rank()
    found = {
        "directions": train("directions", [0]),
        "data": train("data", [rank]),
        "rejected": [rejected(rank, share) for share in CASES],
        "diverged": diverged(rank),
        "refusals": refusals(rank),
    }
    world = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    found["held"] = world() is not None
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def mortal(folder, rank):
    """Rank 1 is killed within a step; rank 0 reports what becomes of it."""
    dist.init_process_group(
        "gloo",
        init_method=Path(folder, "meeting").as_uri(),
        rank=rank,
        world_size=2,
        timeout=START,
    )
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    net, optimizer = build("data")
    data_parallel(optimizer, "data", group)
    optimizer.step(lambda: loss_of(net, 0, rank))
    theta = weights_hash(optimizer)

    def closure():
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_of(net, 1, rank)

    start = time.monotonic()
    try:
        optimizer.step(closure)
    except RuntimeError:
        kept = weights_hash(optimizer) == theta and optimizer.draw == optimizer.n
        found = {"kept": kept, "seconds": time.monotonic() - start}
        Path(folder, "survivor.json").write_text(json.dumps(found))


def command(*arguments):
    return [sys.executable, *map(str, arguments)]


@pytest.fixture(scope="module")
def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}  # as `alone` is


@pytest.fixture(scope="module")
def found(tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("ranks")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    done = subprocess.run(
        command(*launch, __file__, folder), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("share", "union"), [("directions", [0]), ("data", [0, 1])])
def test_two_ranks_have_the_bits_of_one_process(found, alone, share, union):
    one = alone(share, union)
    assert found[0][share] == one and found[1][share] == one
    assert sum(one[1][-20:]) < 0.8 * sum(one[1][:20])  # and it did learn


def test_a_nan_on_one_rank_rejects_the_step_on_all(found):
    assert [rank["rejected"] for rank in found] == [[[1, True], [1, True]]] * 2


def test_ranks_that_start_differently_are_told_what_differs(found):
    for rank in found:
        said = rank["refusals"]
        assert said["seed"].startswith(
            "ValueError: data_parallel: seed must be the same on all ranks, "
            "got 0 on rank 0 and 5 on rank 1; "
        )
        assert "lr of group 0 must be the same on all ranks, got 0.5 on rank 0" in said["lr"]
        assert "share must be one of ('directions', 'data'), got 'rows'" in said["share"]
        assert "probe must be other than in_place for bf16 or fp16" in said["drift"]


def test_ranks_that_diverge_are_told_so(found):
    for step, weights in (rank["diverged"] for rank in found):
        assert "gather: draw and number of losses must be the same on all ranks" in step
        assert "got [(0, 2), (1, 2)]" in step
        assert "assert_in_sync: weights (SHA-256) must be the same on all ranks" in weights


def test_a_rank_that_is_killed_ends_the_other_with_its_weights_restored(tmp_path, environment):
    processes = []
    for rank in (0, 1):
        with (tmp_path / f"{rank}.txt").open("w") as log:
            ranked = command(__file__, tmp_path, rank)
            processes.append(subprocess.Popen(ranked, env=environment, stderr=log))
    try:
        for process in processes:
            process.wait(timeout=200)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    complaints = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    survivor, victim = processes
    assert victim.returncode == -signal.SIGKILL, complaints[1]
    assert survivor.returncode == 0, complaints[0]
    report = json.loads((tmp_path / "survivor.json").read_text())
    assert report["kept"] and report["seconds"] < TIMEOUT + 5


def test_nothing_holds_the_process_group_when_it_is_destroyed(found):
    # Its threads would go on, and abort a rank that exits (gloo, torch 2.13).
    assert [rank["held"] for rank in found] == [False, False]


def test_without_a_process_group_it_says_what_to_do():
    with pytest.raises(RuntimeError, match="data_parallel: a process group must be initialized"):
        data_parallel(build("data")[1])


if __name__ == "__main__":
    if len(sys.argv) == 2:
        ranks(sys.argv[1])
    else:
        mortal(sys.argv[1], int(sys.argv[2]))
        dist.destroy_process_group()
