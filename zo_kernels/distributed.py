# SPDX-License-Identifier: Apache-2.0
"""Data-parallel zeroth-order training: ranks exchange losses, never gradients or weights.

    # train.py; run it: torchrun --nproc-per-node 2 train.py
    torch.distributed.init_process_group(timeout=timedelta(seconds=60))
    optimizer = ZOSGD(model.named_parameters(), lr=1e-3, n=4)  # the same on every rank
    data_parallel(optimizer, share="directions")
    for batch in data:
        loss = optimizer.step(lambda: model(**batch).loss)  # a share of the 2n evaluations
    torch.distributed.destroy_process_group()

| share        | a rank evaluates             | on            | a step equals that of one process  |
|--------------|------------------------------|---------------|------------------------------------|
| `directions` | its block of the evaluations | the one batch | on that batch                      |
| `data`       | all of them                  | its own batch | whose closure returns the mean     |
|              |                              |               | loss over the batches, in fp64     |

A step exchanges one fp64 loss for each evaluation, once. Every rank then makes the same update from
the same numbers, so that the weights stay equal to the bit: nothing has to be broadcast, and no
DistributedDataParallel is needed (it would allocate gradients). Modules that change buffers in a
forward pass, such as a batch norm in train mode, have to be frozen or synchronized by the caller.

Floating point. Ranks agree with each other whatever the last bits of their losses, as all use the
numbers that were gathered; they need the same type of device and the same build of this package.
To agree with a run of one process as well, a loss has to have the same bits wherever it is
evaluated: the same hardware, torch and number of threads (torchrun sets OMP_NUM_THREADS=1 unless it
is set; start the single process likewise). Dropout has to draw the same numbers in each evaluation
of a step, on whichever rank: seed it by the step.

Failures. A loss that is NaN or infinite on one rank rejects the step on all of them. If a rank
dies, or does not come, `step` or `tell` raises on the others: at once where the backend notices
(gloo), else after `init_process_group(timeout=...)`, whose default is half an hour. The step is
cancelled: their weights are theta, ready to be saved. A rank whose closure raises has to end, or to
repeat the step, as the others wait for its losses. An nccl watchdog ends the process instead;
losses go through the CPU if the group has a backend for it, so prefer
`init_process_group("cpu:gloo,cuda:nccl")` to a bare "nccl". A program ends with
`destroy_process_group()`, and imports this module before `init_process_group()`: else a rank whose
gloo threads still run may be aborted as it exits ("terminate called without an active exception").
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zo_kernels.estimators import check, schedule
from zo_kernels.optim._probe import choose
from zo_kernels.optim._step import ZOOptimizer

if dist.is_available():
    # torch imports it when the first optimizer is built, and its default arguments are the process
    # group of that moment. Held by them, gloo's threads survive destroy_process_group(), and one
    # that lets go of a tensor while the interpreter ends aborts it. Here there is no group yet.
    import torch.distributed.nn.functional

SHARES = ("directions", "data")
_SETTINGS = ("n", "estimator", "kind", "seed", "probe", "keep_perturbed", "scaling")
_COUNTERS = ("draw", "steps", "rejected", "clipped")


def data_parallel(
    optimizer: ZOOptimizer, share: str = "directions", group: dist.ProcessGroup | None = None
) -> None:
    """Lets the ranks of a process group share every later step of `optimizer`.

    All ranks call it, after loading weights and state. It reads the weights once, to compare them.

    Args:
        optimizer: one of `zo_kernels.optim`; wrapped by `accelerate`, pass its `.optimizer`.
        share: "directions", each rank evaluates a part of the 2n or n + 1 evaluations of a step, on
            the same batch; or "data", each evaluates all of them, on a batch of its own.
        group: the ranks; None is all of them.

    Raises:
        RuntimeError: no process group is initialized, or a rank does not answer.
        ValueError: unknown share, more ranks than evaluations to share, or ranks that do not start
            alike: the first setting, parameter, state or weight that differs is named.
    """
    owner = "data_parallel"
    check(share in SHARES, owner, "share", f"one of {SHARES}", share, "choose one of them")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{owner}: a process group must be initialized, got none; start with torchrun and call "
            "torch.distributed.init_process_group(timeout=...) first"
        )
    different = _first_difference(optimizer, group)
    if different:
        raise ValueError(f"{owner}: {different}; build, seed and load all ranks alike")
    count, ranks = len(schedule(optimizer.estimator, optimizer.n)), dist.get_world_size(group)
    need = f"so large that {ranks} ranks get an evaluation each ({count} to share)"
    fits = share == "data" or count >= ranks
    check(fits, owner, "n", need, optimizer.n, "raise n, or use share='data'")
    fits = share == "data" or not _drifts(optimizer)
    need = "other than in_place for bf16 or fp16 weights, which would drift apart"
    check(fits, owner, "probe", need, optimizer.probe, "use 'virtual' or 'snapshot'")
    optimizer.exchange = Gathered(share, group)


def weights_hash(optimizer: ZOOptimizer) -> str:
    """SHA-256, in hex, of dtype, shape and bytes of every parameter, in the optimizer's order.

    It is that of theta: calls `optimizer.eval()`, which also cancels an open step.
    """
    optimizer.eval()
    return _digest(p for group in optimizer.param_groups for p in group["params"])


def assert_in_sync(optimizer: ZOOptimizer, group: dist.ProcessGroup | None = None) -> None:
    """Compares settings, state and weights of all ranks, which all call it, between two steps.

    Args:
        group: the ranks; None is those of `data_parallel`.

    Raises:
        RuntimeError: something differs; it names the first such thing, and its value on two ranks.
    """
    if group is None and isinstance(optimizer.exchange, Gathered):
        group = optimizer.exchange.group
    different = _first_difference(optimizer, group)
    if different:
        raise RuntimeError(f"assert_in_sync: {different}; load one checkpoint on all ranks")


class Gathered:
    """The `Exchange` of an optimizer: one all-gather of losses a step."""

    def __init__(self, share: str, group: dist.ProcessGroup | None) -> None:
        self.share, self.group = share, group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.device = _device(group)
        self.draw = 0

    def mine(self, plan: list[tuple[int, float]]) -> list[tuple[int, float]]:
        self.draw = plan[0][0]
        return plan[self._block(self.rank, len(plan))] if self.share == "directions" else plan

    def gather(self, losses: list[float], count: int) -> list[float]:
        """Losses of the step: in plan order (`directions`), or means in rank order (`data`).

        Raises:
            RuntimeError: a rank is gone, or is at another step.
        """
        longest = -(-count // self.ranks) if self.share == "directions" else count
        row = [float(self.draw), float(count), *losses, *[0.0] * (longest - len(losses))]
        mine = torch.tensor(row, dtype=torch.float64, device=self.device)
        rows = [torch.zeros_like(mine) for _ in range(self.ranks)]
        dist.all_gather(rows, mine, group=self.group)
        table = [other.tolist() for other in rows]
        if any(other[:2] != row[:2] for other in table):
            places = [(int(other[0]), int(other[1])) for other in table]
            raise RuntimeError(
                "gather: draw and number of losses must be the same on all ranks, got "
                f"{places}; after an error, repeat or cancel the step on every rank"
            )
        values = [other[2:] for other in table]
        if self.share == "data":
            return [reduce(add, column) / self.ranks for column in zip(*values, strict=True)]
        blocks = [self._block(rank, count) for rank in range(self.ranks)]
        return [
            loss
            for block, own in zip(blocks, values, strict=True)
            for loss in own[: block.stop - block.start]
        ]

    def _block(self, rank: int, count: int) -> slice:
        """The evaluations of a rank: blocks of the plan whose lengths differ by one at most."""
        return slice(rank * count // self.ranks, (rank + 1) * count // self.ranks)


def _drifts(optimizer: ZOOptimizer) -> bool:
    """Whether the weights after the probes of a step depend on which probes they were."""
    params = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    in_place = choose(optimizer.probe, params) == "in_place"
    return in_place and any(p.dtype != torch.float32 for p in params)


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where scalars are exchanged: on the CPU if the group can, as they are there already."""
    backends = dist.get_backend_config(group)
    if "cpu:" in backends:
        return torch.device("cpu")
    return torch.device(backends.split(":")[0], torch.accelerator.current_device_index())


def _first_difference(optimizer: ZOOptimizer, group: dist.ProcessGroup | None) -> str | None:
    """What the ranks do not have in common, in words; the same on every rank."""
    facts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(facts, _facts(optimizer), group=group)
    first = facts[0]
    for rank, other in enumerate(facts):
        for name in [*first, *(name for name in other if name not in first)]:
            here, there = first.get(name, "nothing"), other.get(name, "nothing")
            if here != there:
                got = f"{here!r} on rank 0 and {there!r} on rank {rank}"
                return f"{name} must be the same on all ranks, got {got}"
    return None


def _facts(optimizer: ZOOptimizer) -> dict[str, Any]:
    """Name and value of all that decides the later steps, in the order of comparison."""
    hashed = weights_hash(optimizer)  # the first: it takes a kept perturbation out of the groups
    facts: dict[str, Any] = {"class": type(optimizer).__name__}
    for name in (*_SETTINGS, *_COUNTERS):
        value = getattr(optimizer, name)
        facts[name] = tuple(value) if isinstance(value, tuple) else value
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name not in ("params", "streams", "param_names"):
                facts[f"{name} of group {number}"] = _plain(value)
        for i, (p, stream) in enumerate(zip(group["params"], group["streams"], strict=True)):
            about = f"{p.dtype} {tuple(p.shape)} on {p.device.type}, stream {stream}"
            trained = "trained" if p.requires_grad else "frozen"
            facts[f"parameter {i} of group {number}"] = f"{about}, {trained}"
    facts["weights (SHA-256)"] = hashed
    facts["state (SHA-256)"] = _digest(_state(optimizer))
    return facts


def _state(optimizer: ZOOptimizer) -> Iterable[object]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            for name, value in sorted(optimizer.state.get(p, {}).items()):
                yield from (name, value)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


@torch.no_grad()
def _digest(values: Iterable[object]) -> str:
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            total.update(f"{value.dtype} {tuple(value.shape)}".encode())
            total.update(_bytes(value))
        else:
            total.update(repr(value).encode())
    return total.hexdigest()


def _bytes(x: Tensor) -> memoryview | bytes:
    flat = x.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
