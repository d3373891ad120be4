# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of `add_noise_` without a GPU: interpreted on the CPU."""

import pytest
import torch

from zo_kernels import rng
from zo_kernels.ops.add_noise import DTYPES, add_noise_ref
from zo_kernels.testing import SIZES, assert_same_bits

triton = pytest.importorskip("triton")
kernel = pytest.importorskip("zo_kernels.kernels.add_noise")

checks = pytest.importorskip("triton_checks")


@checks.quiet
@pytest.mark.interpreter
@pytest.mark.parametrize("draws", [[0], [2**40 + 3, -7]], ids=len)
@pytest.mark.parametrize("kind", rng.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(dtype, kind, draws, rounded):
    params = [torch.linspace(-1, 1, n).to(dtype) for n in SIZES]
    wanted = [p.clone() for p in params]
    streams = [0, 1, 2**31, 2**32 - 1, 5, 6]
    scales = torch.tensor([1e-3, -2.0][: len(draws)])
    arguments = (streams, -5, draws, scales, torch.tensor(0.9), kind)
    kernel.add_noise__triton(params, *arguments)
    add_noise_ref(wanted, *arguments)
    for p, w in zip(params, wanted, strict=True):
        assert_same_bits(p, w)


@checks.quiet
@pytest.mark.interpreter
@pytest.mark.parametrize("kind", rng.KINDS)
def test_misaligned_and_empty(kind):
    def views():
        x = torch.linspace(-1, 1, 600)
        return [x[1:101], x[103:600], x[:0]]

    params, wanted = views(), views()
    arguments = ([0, 1, 2], 7, [1], torch.tensor([0.5]), torch.tensor(1.0), kind)
    kernel.add_noise__triton(params, *arguments)
    add_noise_ref(wanted, *arguments)
    for p, w in zip(params, wanted, strict=True):
        assert_same_bits(p, w)


@pytest.mark.slow
def test_interpreter():
    """Runs the tests above, in a process whose Triton interprets."""
    assert checks.interpreted(__file__) == 14
