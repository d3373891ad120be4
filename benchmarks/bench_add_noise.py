# SPDX-License-Identifier: Apache-2.0
"""`add_noise_` against what one writes without it, on the CPU.

    ZO_BENCH_ELEMENTS=4194304 pytest benchmarks/bench_add_noise.py

ZO_BENCH_ELEMENTS is the size of the parameter, 4 Mi by default. The least traffic of one call is a
read and a write of it, which `add_` alone makes. Each row says the backend and the threads, and is
timed only after its kernel gave the reference's bits in the same process.
"""

import os

import pytest
import torch

from zo_kernels import rng
from zo_kernels._registry import OPS
from zo_kernels.ops import add_noise_, use_backend
from zo_kernels.testing import assert_same_bits

ELEMENTS = int(os.environ.get("ZO_BENCH_ELEMENTS", 2**22))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=DTYPES)
def parameter(request, benchmark):
    p = torch.zeros(ELEMENTS, dtype=DTYPES[request.param])
    benchmark.group = f"add_noise {request.param}"
    benchmark.extra_info["bytes"] = 2 * p.nbytes
    benchmark.extra_info["threads"] = torch.get_num_threads()
    return p


@pytest.mark.parametrize("kind", rng.KINDS)
def test_add_noise(benchmark, parameter, kind):
    def call(p):
        add_noise_([p], [0], 1, [0], [1e-3], kind=kind)

    fast, slow = (torch.ones(4097, dtype=parameter.dtype) for _ in range(2))
    call(fast)
    with use_backend("reference"):
        call(slow)
    assert_same_bits(fast, slow)

    arguments = ([parameter], [0], 1, [0], torch.ones(1), torch.tensor(1.0), kind)
    benchmark.extra_info["backend"] = OPS["add_noise_"].choose(arguments)
    benchmark(call, parameter)


def test_torch_normal_and_add(benchmark, parameter):
    """MeZO's own way: reseed, draw a tensor of the size of the parameter, add it."""
    generator = torch.Generator()

    def call():
        generator.manual_seed(1)
        z = torch.normal(0.0, 1.0, parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.add_(z, alpha=1e-3)

    benchmark(call)


def test_add_alone(benchmark, parameter):
    """The same read and write of the parameter, without noise."""
    benchmark(parameter.add_, 1e-3)
