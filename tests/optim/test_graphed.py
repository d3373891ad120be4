# SPDX-License-Identifier: Apache-2.0
"""`GraphedStep`: what a graph has frozen, run again, gives the bits of the ordinary step."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from zo_kernels.optim import ZOSGD, GraphedStep, ZOAdam, ZOSignSGD
from zo_kernels.testing import assert_same_bits

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
KINDS = {
    "sgd": (ZOSGD, {"lr": 1e-2}),
    "momentum": (ZOSGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    "sign": (ZOSignSGD, {"lr": 1e-3}),
    "adam": (ZOAdam, {"lr": 1e-2, "weight_decay": 0.1}),
}
PROBES = {
    "in_place": {"probe": "in_place"},
    "keep_perturbed": {"probe": "in_place", "keep_perturbed": True},
    "snapshot": {"probe": "snapshot", "estimator": "one_sided", "n": 2},
    "virtual": {"probe": "virtual", "n": 2},
}


class Pair:
    """The same problem twice: for `optimizer.step`, and for a `GraphedStep`."""

    def __init__(self, name, device="cpu", dtype=torch.float32, **options):
        kind, own = KINDS[name]
        self.x = torch.linspace(-1, 1, 12, device=device).reshape(4, 3).to(dtype)
        self.models, self.optimizers = [], []
        for _ in range(2):
            weight = torch.linspace(-1, 1, 15, device=device).reshape(5, 3).to(dtype)
            bias = torch.full((5,), 0.1, dtype=dtype, device=device)
            params = [weight.requires_grad_(), bias.requires_grad_()]
            self.models.append(params)
            self.optimizers.append(kind(params, **(own | options)))
        self.graphed = GraphedStep(self.optimizers[1], lambda: self.loss(1))

    def loss(self, which):
        return F.linear(self.x, *self.models[which]).square().mean().float()

    def step(self):
        wanted = self.optimizers[0].step(lambda: self.loss(0))
        got = self.graphed()
        assert got == wanted or (got != got and wanted != wanted)
        return got

    def check(self):
        for optimizer in self.optimizers:
            optimizer.eval()
        for got, wanted in zip(self.models[1], self.models[0], strict=True):
            assert_same_bits(got.detach(), wanted.detach())
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        assert states[0]["zo"] == states[1]["zo"]
        for i, state in states[0]["state"].items():
            for key, value in state.items():
                other = states[1]["state"][i][key]
                same = torch.equal(other, value) if hasattr(value, "shape") else other == value
                assert same, key


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name", KINDS)
def test_the_bits_of_the_ordinary_step(name, probe, device):
    pair = Pair(name, device, **PROBES[probe])
    start = pair.models[1][0].detach().clone()
    losses = [pair.step() for _ in range(6)]
    pair.check()
    assert len(set(losses)) == 6 and not torch.equal(start, pair.models[1][0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("probe", ["snapshot", "virtual"])
def test_16_bits_are_rounded_at_random_by_the_same_bits(probe, dtype, device):
    pair = Pair("momentum", device, dtype, probe=probe)
    for _ in range(5):
        pair.step()
    pair.check()


@pytest.mark.parametrize("probe", PROBES)
def test_what_may_change_from_step_to_step(probe):
    pair = Pair("momentum", **PROBES[probe])
    for number in range(8):
        for optimizer in pair.optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
            optimizer.param_groups[0]["eps"] = 1e-3 if number < 4 else 2e-3
        for params in pair.models:
            params[1].requires_grad_(number not in (2, 3))
        pair.x.mul_(0.9)
        pair.step()
    pair.check()


@pytest.mark.parametrize("options", [{"clip": 0.5}, {"normalize": True}, {"scalar_beta": 0.9}])
def test_scaling_is_that_of_the_host(options):
    pair = Pair("adam", n=2, **options)
    for _ in range(4):
        pair.step()
    pair.check()
    assert pair.optimizers[0].clipped == pair.optimizers[1].clipped


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("probe", PROBES)
def test_a_loss_that_is_not_finite_rejects_the_step(probe, device):
    pair = Pair("adam", device, **PROBES[probe])
    kept = pair.x.clone()
    for bad in (False, False, True, False, True, False):
        pair.x.copy_(kept * float("nan") if bad else kept)
        pair.step()
    pair.check()
    assert pair.optimizers[1].rejected == 2


@pytest.mark.parametrize("probe", PROBES)
def test_a_closure_that_raises_leaves_the_weights(probe):
    pair = Pair("sgd", **PROBES[probe])
    for _ in range(3):
        pair.step()
    pair.check()
    calm, calls = pair.graphed.closure, itertools.count()

    def closure():
        if next(calls) == 1:
            raise KeyError("broken")
        return calm()

    pair.graphed.closure = closure
    with pytest.raises(KeyError):
        pair.graphed()
    pair.check()
    pair.graphed.closure = calm
    for _ in range(3):
        pair.step()
    pair.check()


def test_a_step_of_a_kind_is_made_once():
    pair = Pair("sgd", **PROBES["keep_perturbed"])
    for _ in range(40):
        pair.step()
    # With the perturbation in the weights, or without: after a look at the grid.
    assert len(pair.graphed._evaluations) == 2 and len(pair.graphed._updates) == 1


def test_a_parameter_that_moves_in_memory_is_another_kind():
    pair = Pair("sgd", probe="snapshot")
    pair.step()
    for params in pair.models:
        params[0].data = params[0].data.clone()
    pair.step()
    pair.check()


@pytest.mark.parametrize("loss", [1.0, torch.ones(2), torch.ones(1, device="meta")], ids=str)
def test_a_loss_that_a_graph_cannot_keep_is_refused(loss):
    pair = Pair("sgd")
    pair.graphed.closure = lambda: loss
    with pytest.raises(TypeError, match="closure must return a one-element tensor on cpu"):
        pair.graphed()


def test_parameters_on_several_devices_are_refused():
    params = [torch.ones(3).requires_grad_(), torch.ones(3, device="meta").requires_grad_()]
    graphed = GraphedStep(ZOSGD(params, probe="virtual"), lambda: torch.ones(()))
    with pytest.raises(ValueError, match="params must be on one device, got 'on 2 devices'"):
        graphed()
