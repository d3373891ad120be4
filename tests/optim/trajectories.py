# SPDX-License-Identifier: Apache-2.0
"""What the tests of trajectories share: a small model, and runs of it with a log."""

import torch
from torch import nn

from zo_kernels.optim import ZOSGD, ZOAdam, ZOSignSGD
from zo_kernels.optim.trajectory import TrajectoryWriter

STEPS = 60
BF16 = torch.bfloat16
OPTIMIZERS = {
    "sgd": (ZOSGD, {"lr": 0.002}),
    "sgd-decay": (ZOSGD, {"lr": 0.002, "weight_decay": 0.5}),
    "momentum": (ZOSGD, {"lr": 0.001, "momentum": 0.5, "weight_decay": 0.1}),
    "adam": (ZOAdam, {"lr": 0.02, "weight_decay": 0.1}),
    "sign": (ZOSignSGD, {"lr": 0.01}),
    "signum": (ZOSignSGD, {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.1}),
}


class Net(nn.Module):
    """Tied, frozen and scalar parameters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.last = nn.Linear(7, 5)
        self.twin = nn.Linear(5, 7)
        self.twin.weight = self.first.weight
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.linspace(-1, 1, 5), requires_grad=False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x) + self.twin(x))) * self.gain + self.frozen


def net(dtype=torch.float32):
    torch.manual_seed(1)
    return Net().to(dtype)


def loss_of(model):
    x = torch.linspace(-1, 1, 20).reshape(4, 5).to(model.gain.dtype)
    return (model(x) - 1).double().square().mean()


def train(model, optimizer, steps=STEPS, schedule=None, broken=()):
    for number in range(steps):
        optimizer.step(lambda bad=number in broken: loss_of(model) * (float("nan") if bad else 1.0))
        if schedule is not None:
            schedule.step()


def same(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(k == m and torch.equal(x, y) for (k, x), (m, y) in pairs)


def tensors(model):
    """As `safetensors` wants them: without the second name of a tied one."""
    return {name: p.detach() for name, p in model.named_parameters()}


def record(path, optimizer_name="sgd", steps=STEPS, dtype=torch.float32, close=True, **settings):
    """A model that was trained with a log at `path`, its optimizer and its log."""
    kind, defaults = OPTIMIZERS[optimizer_name]
    model = net(dtype)
    optimizer = kind(model.named_parameters(), **(defaults | settings))
    optimizer.log = TrajectoryWriter(path, optimizer, model)
    train(model, optimizer, steps)
    if close:
        optimizer.log.close()
    return model, optimizer


def crash(optimizer):
    optimizer.log._file.close()
