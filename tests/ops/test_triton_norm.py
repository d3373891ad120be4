# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `group_norm` without a GPU: interpreted, or compiled ahead of time."""

import pytest
import torch
import torch.nn.functional as F

from zo_kernels.testing import assert_close_to_math, assert_same_bits

pytest.importorskip("triton")
checks = pytest.importorskip("triton_checks")
from zo_kernels.kernels import _norm  # noqa: E402
from zo_kernels.kernels.group_norm import group_norm_triton  # noqa: E402
from zo_kernels.kernels.group_norm_quantize import group_norm_quantize_triton  # noqa: E402
from zo_kernels.kernels.quantize_rows import quantize_rows_triton  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """So that several of them meet in a picture."""
    for name, size in (("PIXELS", 16), ("ROWS", 8), ("CHANNELS", 8), ("BLOCK", 128)):
        monkeypatch.setattr(_norm, name, size)


def interpreter(test):
    return checks.quiet(pytest.mark.interpreter(pytest.mark.usefixtures("rounded")(test)))


def case(shape, dtype, mean=0.0):
    g = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=g) + mean).to(dtype)
    weight, bias = torch.randn(2, shape[1], generator=g).to(dtype)
    return x, weight, bias, torch.randn(shape[:2], generator=g).to(dtype)


def by_torch(x, weight, bias, shift, groups):
    return F.silu(torch.group_norm(x + shift[:, :, None, None], groups, weight, bias, 1e-5))


@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((2, 14, 5, 4), 2), ((1, 1, 1, 1), 1)])
def test_as_exact_as_torch(shape, groups, dtype):
    x, *more = case(shape, dtype)
    theirs = by_torch(x.float(), *(t.float() for t in more), groups).to(dtype)
    exact = by_torch(x.double(), *(t.double() for t in more), groups)
    y = group_norm_triton(x, groups, *more[:2], 1e-5, more[2], "silu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_math(y, theirs, exact)


@interpreter
def test_a_large_mean_costs_no_digits():
    x, weight, bias, _ = case((1, 8, 5, 4), torch.float32, mean=1000.0)
    exact = F.group_norm(x.double(), 2, weight.double(), bias.double())
    y = group_norm_triton(x.to(memory_format=torch.channels_last), 2, weight, bias)
    assert (y.double() - exact).abs().max() < 5e-4


@interpreter
def test_quantized_is_quantize_rows_of_the_floats():
    x, weight, bias, shift = case((2, 14, 5, 4), torch.float32)
    arguments = (x, 2, weight, bias, 1e-5, shift, "silu")
    codes, scale = group_norm_quantize_triton(*arguments)
    wanted, wanted_scale = quantize_rows_triton(group_norm_triton(*arguments), True)
    assert_same_bits(codes, wanted)
    assert_same_bits(scale, wanted_scale)


@interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_surfaces(bad):
    x, weight, bias, _ = case((2, 8, 4, 4), torch.float32)
    x[1, 5, 2, 2] = bad
    y = group_norm_triton(x, 2, weight, bias)
    assert y[0].isfinite().all() and y[1, :4].isfinite().all() and y[1, 4:].isnan().all()
    codes, scale = group_norm_quantize_triton(x, 2, weight, bias)
    assert scale[0].isfinite() and scale[1].isnan() and not codes[1].any()


@interpreter
def test_empty_batch():
    codes, scale = group_norm_quantize_triton(torch.ones(0, 4, 3, 2), 2)
    assert group_norm_triton(torch.ones(0, 4, 3, 2), 2).shape == codes.shape == (0, 4, 3, 2)
    assert scale.shape == (0,)


@pytest.mark.slow
def test_interpreter():
    """Runs the tests above, in a process whose Triton interprets."""
    assert checks.interpreted(__file__) == 11


@pytest.mark.parametrize("architecture", checks.TARGETS)
def test_ahead_of_time(architecture, monkeypatch, tmp_path):
    monkeypatch.undo()  # programs of their true sizes
    x = torch.empty(2, 320, 64, 64, dtype=torch.bfloat16, device="meta")
    vector = torch.empty(320, dtype=torch.bfloat16, device="meta")
    shift = torch.empty(2, 320, dtype=torch.bfloat16, device="meta")
    with checks.compiling(architecture, monkeypatch, tmp_path) as kernels:
        group_norm_triton(x, 32, vector, vector, 1e-5, shift, "silu")
        group_norm_quantize_triton(x, 32, vector, vector, 1e-5, shift, "silu")
    assert len(kernels) == 2 + 2 + 3
    for kernel in kernels:
        checks.check_resources(kernel, architecture, tmp_path)
