# SPDX-License-Identifier: Apache-2.0
"""The update ops as rules of one form, and the backends that they are tested on."""

import contextlib

import pytest
import torch

from zo_kernels import _native
from zo_kernels._registry import cpp_available, use_backend
from zo_kernels.kernels._triton import triton_available
from zo_kernels.ops import add_noise_, zo_adam_, zo_sgd_
from zo_kernels.testing import ran
from zo_kernels.updates_numpy import add_noise_numpy, zo_adam_numpy, zo_sgd_numpy

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
C = _native.binding()
BACKENDS = ["reference"]
if cpp_available() is None:
    BACKENDS += [f"cpp {isa}" for isa in C.cpu_isas_available()]
if triton_available() is None:
    BACKENDS.append("triton")
SEED, DRAWS, FACTORS = 2**63 + 5, [3, 2**40 + 1, 2**40 + 1, -2], [1e-2, -0.3, 0.1, 0.5]
SGD = {"lr": 0.03, "weight_decay": 0.1}
ADAM = {"lr": 0.03, "weight_decay": 0.1, "step": 3, "adam_eps": 1e-3}
# op, its numpy twin, states, options
RULES = {
    "add_noise": (add_noise_, add_noise_numpy, 0, {"decay": 0.9}),
    "sgd": (zo_sgd_, zo_sgd_numpy, None, SGD),
    "sgd sign": (zo_sgd_, zo_sgd_numpy, None, SGD | {"sign": True}),
    "sgd momentum": (zo_sgd_, zo_sgd_numpy, 1, SGD | {"momentum": 0.9}),
    "sgd momentum sign": (zo_sgd_, zo_sgd_numpy, 1, SGD | {"momentum": 0.9, "sign": True}),
    "adam": (zo_adam_, zo_adam_numpy, 2, ADAM),
}
STEPS = [name for name in RULES if name != "add_noise"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """A context that asserts that an op ran there."""
    name, _, isa = request.param.partition(" ")
    before = C.cpu_isa() if C is not None else None

    @contextlib.contextmanager
    def on(op):
        if isa:
            C.set_isa(isa)
        with use_backend(name), ran(op, name):
            yield

    on.name = name
    on.device = "cuda" if name == "triton" else "cpu"
    yield on
    if before is not None:
        C.set_isa(before)


def states_of(params, count):
    """As the op takes them: lists, or None for no buffers."""
    if count is None:
        return [None]
    moments = [[torch.linspace(-1, 1, p.numel()).view(p.shape).to(p.device) for p in params]]
    if count == 2:
        moments.append([x * x for x in moments[0]])
    return moments[:count]


def values(n, dtype=F32, device="cpu"):
    return torch.linspace(-1, 1, n).to(device, dtype)
