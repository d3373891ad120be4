# SPDX-License-Identifier: Apache-2.0
"""How perturbations get under an evaluation: never written, or written and exactly taken back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zo_kernels.optim import ZOSGD, _calls, _grid, _probe
from zo_kernels.optim._probe import SNAPSHOT_BYTES, choose

EXACT = [
    ("virtual", torch.float32),
    ("virtual", torch.bfloat16),
    ("virtual", torch.float16),
    ("snapshot", torch.bfloat16),
    ("in_place", torch.float32),
]


class Everything(nn.Module):
    """Modules that read their weights in many ways, some of them tied, sliced or transposed."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.group = nn.GroupNorm(2, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.LayerNorm(8)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 5)
        self.out.weight = self.table.weight
        self.gain = nn.Parameter(torch.ones(2, 8))

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.group(self.conv(x[:, None])).sum(1)
        x = x + self.attention(x, x, x)[0]
        x = self.memory(self.layer(x) * self.gain[0] + self.gain.T[:, 1])[0]
        return self.out(x)


def everything(dtype=torch.float32):
    torch.manual_seed(0)
    return Everything().eval().to(dtype)


def loss_of(model):
    ids = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    return F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())


def same_bits(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inference", [False, True])
def test_virtual_is_snapshot_without_the_writing(make, dtype, inference):
    """Every module sees the same perturbed bits, whatever way it reads them."""
    losses, models = [], []
    for probe in ("snapshot", "virtual"):
        model = everything(dtype)
        optimizer = make(model.named_parameters(), probe=probe, n=2, eps=1e-2)
        versions = [p._version for p in model.parameters()]
        trace = []

        def closure(model=model, probe=probe, versions=versions, trace=trace):
            with torch.inference_mode(inference):
                trace.append(loss_of(model).item())
            if probe == "virtual" and len(trace) <= 4:
                assert [p._version for p in model.parameters()] == versions
            return trace[-1]

        for _ in range(3):
            optimizer.step(closure)
        losses.append(trace)
        models.append(model)
    assert losses[0] == losses[1] and len(set(losses[0])) > 4
    assert same_bits(*models)


@pytest.mark.parametrize(("probe", "dtype"), EXACT)
def test_ten_thousand_probes_leave_the_exact_bits(probe, dtype):
    torch.manual_seed(0)
    weights = [(torch.randn(40) * 0.02).to(dtype), torch.ones(7, dtype=dtype)]
    for w in weights:
        w.requires_grad_()
    optimizer = ZOSGD(weights, lr=0.0, eps=1e-3, probe=probe)
    optimizer.step(lambda: weights[0].sum() + weights[1].sum())  # in place: now on the grid
    before = copy.deepcopy(weights)
    for _ in range(5000):
        optimizer.step(lambda: weights[0].sum() + weights[1].sum())
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_the_grid_moves_a_weight_by_less_than_the_bound():
    torch.manual_seed(0)
    w = torch.randn(10_000).requires_grad_()
    before = w.detach().clone()
    ZOSGD([w], lr=0.0, probe="in_place").step(lambda: w.sum())
    bound = _grid.quantum(before.abs().max().item(), 1e-3) / 2
    assert 0 < (w.detach() - before).abs().max() <= bound
    assert bound <= 2.0**-_grid.BITS * 4 * before.abs().max()


def test_a_weight_that_outgrows_its_grid_gets_a_coarser_one(monkeypatch):
    monkeypatch.setattr(_grid, "RECHECK", 2)
    w = torch.ones(8).requires_grad_()
    optimizer = ZOSGD([w], lr=0.0, probe="in_place")
    optimizer.step(lambda: w.sum())
    first = optimizer.state[w]["quantum"]
    with torch.no_grad():
        w.mul_(100)
    optimizer.step(lambda: w.sum())
    optimizer.step(lambda: w.sum())
    assert optimizer.state[w]["quantum"] > 16 * first
    before = w.detach().clone()
    optimizer.step(lambda: w.sum())
    assert torch.equal(w, before)


class Passes:
    """Counts how often each parameter is read and written."""

    def __init__(self, monkeypatch):
        self.count = 0
        run = _calls.Call.run

        def counted(call, *args):
            self.count += 1
            run(call, *args)

        monkeypatch.setattr(_calls.Call, "run", counted)


@pytest.mark.parametrize(("keep", "passes"), [(False, 3), (True, 2)])
def test_a_two_sided_step_takes_so_many_passes(monkeypatch, keep, passes):
    w = torch.linspace(-1, 1, 100).requires_grad_()
    optimizer = ZOSGD([w], lr=0.01, probe="in_place", keep_perturbed=keep)
    optimizer.step(lambda: w.square().sum())
    monkeypatch.setattr(_grid, "look_at", lambda step: False)  # it takes the perturbation out
    counted = Passes(monkeypatch)
    for _ in range(4):
        optimizer.step(lambda: w.square().sum())
    assert counted.count == 4 * passes


def test_keep_perturbed_changes_no_bit(make):
    """Momentum, Adam and decay take their own pass; the weights are the same in the end."""
    results = []
    for keep in (False, True):
        for decay in (0.0, 0.1):
            w = torch.linspace(-1, 1, 100).requires_grad_()
            optimizer = make([w], probe="in_place", keep_perturbed=keep, weight_decay=decay)
            for step in range(6):
                if step == 3:
                    optimizer.eval()
                    inside = w.detach().clone()
                optimizer.step(lambda w=w: (w - 0.5).square().sum())
            optimizer.eval()
            results.append((inside, w.detach().clone()))
    for plain, kept in zip(results[:2], results[2:], strict=True):
        assert torch.equal(plain[0], kept[0]) and torch.equal(plain[1], kept[1])


def test_keep_perturbed_resumes_and_survives_freezing(make):
    def run(interrupt):
        a, b = (torch.linspace(-1, 1, 9).requires_grad_() for _ in range(2))
        optimizer = make([a, b], probe="in_place", keep_perturbed=True)

        def closure():
            return (a + 2 * b).square().sum()

        for step in range(5):
            if step == 2 and interrupt:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make([a, b], probe="in_place", keep_perturbed=True)
                optimizer.load_state_dict(state)
            b.requires_grad_(step != 3)
            optimizer.step(closure)
        optimizer.eval()
        return a.detach(), b.detach()

    assert all(torch.equal(x, y) for x, y in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("fail_at", [0, 1])
def test_in_place_takes_its_perturbation_out_when_the_closure_raises(make, keep, fail_at):
    w = torch.linspace(-1, 1, 50).requires_grad_()
    optimizer = make([w], lr=0.0, probe="in_place", keep_perturbed=keep)
    optimizer.step(lambda: w.sum())
    optimizer.eval()
    before, calls = w.detach().clone(), iter(range(4))
    optimizer.step(lambda: w.sum())

    def closure():
        if next(calls) == fail_at:
            raise KeyboardInterrupt
        return w.sum()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(w, before)


def test_auto_copies_little_writes_fp32_and_never_writes_less():
    large = SNAPSHOT_BYTES // 4 + 1
    cases = [(1000, torch.float32, "snapshot"), (large, torch.float32, "in_place")]
    cases += [(1000, torch.bfloat16, "snapshot"), (2 * large, torch.bfloat16, "virtual")]
    for numel, dtype, expected in cases:
        assert choose("auto", [torch.zeros(numel, dtype=dtype)]) == expected
    assert choose("virtual", [torch.zeros(1)]) == "virtual"


def test_virtual_refuses_a_closure_that_writes_or_hides_its_reads(make):
    w = torch.ones(3).requires_grad_()
    view = w.detach().view(3)
    optimizer = make([w], probe="virtual")
    with pytest.raises(RuntimeError, match="must not write a trained parameter, got mul_"):
        optimizer.step(lambda: w.mul_(2).sum())
    with pytest.raises(RuntimeError, match=r"closure must read a trained .*'snapshot'"):
        optimizer.step(lambda: view.sum())
    assert torch.equal(w, torch.ones(3)) and optimizer.draw == 0


def test_virtual_asks_no_noise_for_metadata(make):
    w = torch.ones(3, 2).requires_grad_()
    optimizer = make([w], probe="virtual")

    def closure():
        facts = (w.shape, w.dtype, w.device, w.size(0), w.numel(), w.dim(), w.is_contiguous())
        return w.sum() if facts else 0.0

    optimizer.step(closure)
    probe = _probe.make_probe("virtual", optimizer._spans(), 0, "normal")
    probe.write(0, 1.0)
    with probe.reading():
        closure()
    assert probe.reads == 1


@pytest.mark.parametrize("probe", ["snapshot", "in_place"])
def test_compiled_models_work_where_weights_are_written(make, probe):
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        forward = torch.compile(model, backend="eager") if compiled else model
        optimizer = make(model.parameters(), probe=probe)
        x = torch.linspace(-1, 1, 20).reshape(5, 4)
        for _ in range(3):
            optimizer.step(lambda forward=forward, x=x: forward(x).square().mean())
        weights.append(model)
    assert same_bits(*weights)
