# SPDX-License-Identifier: Apache-2.0
"""Resume, groups, schedulers, noise streams, constructor errors and documented defaults."""

import copy
import inspect
import io
import math
import pickle
import re

import pytest
import torch
from torch import nn

from zo_kernels.estimators import ESTIMATORS
from zo_kernels.optim import ZOSGD, ZOAdam, ZOSignSGD
from zo_kernels.optim._base import GroupedOptimizer
from zo_kernels.optim._streams import name_stream

CLASSES = pytest.mark.parametrize("kind", [ZOSGD, ZOAdam, ZOSignSGD])


def model(dtype=torch.float32):
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    for i, p in enumerate(net.parameters()):
        nn.init.constant_(p, 0.1 * (i + 1))
    return net.to(dtype)


def train(net, optimizer, steps, scheduler=None):
    x = torch.linspace(-1, 1, 20).reshape(5, 4).to(next(net.parameters()).dtype)
    for _ in range(steps):
        optimizer.step(lambda: (net(x) - 1).float().square().mean())
        if scheduler is not None:
            scheduler.step()


def same_bits(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_has_the_same_bits(make, estimator, dtype):
    settings = {"estimator": estimator, "n": 2, "seed": 2**62 + 1, "eps": 0.01}
    net = model(dtype)
    optimizer = make(net.parameters(), **settings)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(net, optimizer, 5, schedule)
    optimizer.step(lambda: math.nan)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    train(net, optimizer, 5, schedule)

    file.seek(0)
    weights, state, rates = torch.load(file, weights_only=True)
    again = model(dtype)
    again.load_state_dict(weights)
    resumed = make(again.parameters())  # seed, n and estimator come with the state
    resumed_schedule = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.9)
    resumed_schedule.load_state_dict(rates)
    resumed.load_state_dict(state)
    assert (resumed.draw, resumed.rejected, resumed.seed) == (12, 1, 2**62 + 1)
    train(again, resumed, 5, resumed_schedule)
    assert same_bits(net, again)
    ours, theirs = resumed.state_dict(), optimizer.state_dict()
    torch.testing.assert_close(ours.pop("state"), theirs.pop("state"), rtol=0, atol=0)
    assert ours == theirs


def test_loaded_state_is_a_copy(make):
    net = model()
    optimizer = make(net.parameters())
    train(net, optimizer, 2)
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    other = model()
    twin = make(other.parameters())
    twin.load_state_dict(state)
    train(other, twin, 2)
    torch.testing.assert_close(state["state"], before["state"], rtol=0, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_continue_alike(make, duplicate):
    net = model()
    optimizer = make(net.parameters(), seed=4, n=2)
    train(net, optimizer, 3)
    twin_net, twin = duplicate((net, optimizer))
    train(net, optimizer, 3)
    train(twin_net, twin, 3)
    assert same_bits(net, twin_net)


@CLASSES
def test_state_of_another_optimizer_is_refused(kind):
    net = model()
    optimizer = kind(net.parameters())
    foreign = torch.optim.SGD(net.parameters()).state_dict()
    with pytest.raises(ValueError, match=f"{kind.__name__}.load_state_dict: state_dict must be"):
        optimizer.load_state_dict(foreign)


def test_state_holds_what_its_table_says(make, name):
    p = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
    optimizer = make([p])
    optimizer.step(lambda: p.sum())
    held = [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    bytes_per_parameter = sum(v.numel() * v.element_size() for v in held) / p.numel()
    assert bytes_per_parameter == {"momentum": 4, "signum": 4, "adam": 8}.get(name, 0)


@CLASSES
def test_groups_have_their_own_lr_and_eps(kind):
    a, b, c = (torch.zeros(4, requires_grad=True) for _ in range(3))
    slope = torch.tensor([1.0, 2.0, 4.0, 8.0])  # no signs make its sum vanish
    groups = [{"params": [a], "eps": 0.5}, {"params": [b], "lr": 0.0}]
    optimizer = kind(groups, lr=0.1, eps=0.25, kind="rademacher")
    optimizer.add_param_group({"params": c, "eps": 0.125})
    reach = []

    def closure():
        reach.append([p.detach().abs().max().item() for p in (a, b, c)])
        return sum((p * slope).sum() for p in (a, b, c))

    optimizer.step(closure)
    assert reach == [[0.5, 0.25, 0.125]] * 2
    assert a.abs().max() > 0 and c.abs().max() > 0 and not b.any()
    assert [group["streams"] for group in optimizer.param_groups] == [[0], [1], [2]]


def test_a_scheduler_sets_the_step_size():
    net, twin = model(), model()
    scheduled = ZOSGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda epoch: [1.0, 0.5, 0.0][epoch])
    train(net, scheduled, 2, schedule)
    for step, lr in enumerate((0.1, 0.05)):
        by_hand = ZOSGD(twin.parameters(), lr=lr)
        by_hand.draw = step
        train(twin, by_hand, 1)
    assert same_bits(net, twin)


def test_named_parameters_have_noise_that_ignores_their_order(make):
    nets = model(), model()
    for net, reverse in zip(nets, (False, True), strict=True):
        named = sorted(net.named_parameters(), reverse=reverse)
        optimizer = make(named)
        assert optimizer.param_groups[0]["streams"] == [name_stream(key) for key, _ in named]
        train(net, optimizer, 5)
    assert same_bits(*nets)


def test_given_streams_make_order_and_grouping_irrelevant(make):
    nets = model(), model()
    for net, reverse in zip(nets, (False, True), strict=True):
        params = list(enumerate(net.parameters()))[:: -1 if reverse else 1]
        optimizer = make([{"params": [p], "streams": [10 + i]} for i, p in params])
        train(net, optimizer, 5)
    assert same_bits(*nets)


def test_the_stream_of_a_name_is_fixed():
    assert name_stream("0.weight") == 3806685279  # saved states rely on it


@CLASSES
@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"params": [0], "streams": [1, 2]}], "streams must be 1 numbers, got [1, 2]"),
        ([{"params": [0, 1], "streams": [3, 3]}], "streams must be distinct 32-bit numbers, got 3"),
        ([{"params": [0], "streams": [2**32]}], "distinct 32-bit numbers, got 4294967296"),
        ([{"params": [0]}, {"params": [1], "streams": [0]}], "distinct 32-bit numbers, got 0"),
        ([{"params": [0], "eps": -1.0}], "eps must be finite and > 0, got -1.0"),
    ],
)
def test_wrong_groups_are_refused(kind, groups, message):
    tensors = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    groups = [group | {"params": [tensors[i] for i in group["params"]]} for group in groups]
    with pytest.raises(ValueError, match=f"^{kind.__name__}: .*{re.escape(message)}"):
        kind(groups)


COMMON = [("lr", -1.0), ("lr", math.nan), ("lr", "fast"), ("eps", 0.0), ("eps", math.inf)]
COMMON += [("weight_decay", -0.1), ("n", 0), ("estimator", "both"), ("kind", "uniform")]
COMMON += [("seed", 1.0), ("probe", "virtual?")]


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [(kind, *pair) for kind in (ZOSGD, ZOAdam) for pair in COMMON]
    + [(ZOSGD, "momentum", 1.0), (ZOAdam, "betas", (0.9, 1.0)), (ZOAdam, "betas", 0.9)]
    + [(ZOAdam, "adam_eps", -1e-8)],
)
def test_constructor_errors_name_argument_bound_and_value(kind, argument, value):
    with pytest.raises(ValueError) as error:
        kind([torch.zeros(2, requires_grad=True)], **{argument: value})
    text = str(error.value)
    assert re.fullmatch(rf"{kind.__name__}: {argument} must be .+, got .+; .+", text)
    assert f"got {value!r};" in text


@CLASSES
def test_documented_defaults_are_the_signature(kind):
    documented = dict(re.findall(r"^ {8}(\w+) \(\w+, default (.+?)\):", kind.__doc__, re.MULTILINE))
    signatures = [inspect.signature(c) for c in (GroupedOptimizer, kind)]
    parameters = [p for signature in signatures for p in signature.parameters.values()]
    actual = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    assert {key: eval(value) for key, value in documented.items()} == actual


@CLASSES
def test_seed_zero_is_a_seed(kind):
    nets = [model() for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        train(net, kind(net.parameters(), lr=0.1, seed=seed), 3)
    assert same_bits(nets[0], nets[1]) and not same_bits(nets[0], nets[2])
