# SPDX-License-Identifier: Apache-2.0
"""The table of optimizers: a test that takes `make` runs once for each of its rows."""

import pytest

from zo_kernels.optim import ZOSGD, ZOAdam, ZOSignSGD

OPTIMIZERS = {
    "sgd": (ZOSGD, {"lr": 0.02}),
    "momentum": (ZOSGD, {"lr": 0.01, "momentum": 0.5}),
    "adam": (ZOAdam, {"lr": 0.05}),
    "sign": (ZOSignSGD, {"lr": 0.05}),
    "signum": (ZOSignSGD, {"lr": 0.05, "momentum": 0.5}),
}


@pytest.fixture(params=OPTIMIZERS)
def name(request):
    return request.param


@pytest.fixture
def make(name):
    """A constructor with defaults that suit small problems."""
    kind, defaults = OPTIMIZERS[name]
    return lambda params, **arguments: kind(params, **(defaults | arguments))
