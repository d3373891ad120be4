# SPDX-License-Identifier: Apache-2.0
"""`layer_norm_quantize` and `geglu_quantize` in Triton without a GPU: interpreted, or compiled
ahead of time."""

import math

import pytest
import torch
import torch.nn.functional as F
from quantized_twins import strided

from zo_kernels.testing import assert_same_bits

pytest.importorskip("triton")
checks = pytest.importorskip("triton_checks")
from zo_kernels.kernels import _rows  # noqa: E402
from zo_kernels.kernels.geglu_quantize import geglu_quantize_triton  # noqa: E402
from zo_kernels.kernels.layer_norm_quantize import layer_norm_quantize_triton  # noqa: E402
from zo_kernels.kernels.quantize_rows import quantize_rows_triton  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = {"layer_norm": layer_norm_quantize_triton, "geglu": geglu_quantize_triton}
both = pytest.mark.parametrize("name", OPS)


def interpreter(test):
    return checks.quiet(pytest.mark.interpreter(pytest.mark.usefixtures("rounded")(test)))


def case(name, shape, dtype=torch.float32, mean=0.5):
    """Arguments of the op, and its mathematics over them."""
    g = torch.Generator().manual_seed(sum(shape))
    if name == "geglu":
        x = torch.randn((*shape[:-1], 2 * shape[-1]), generator=g).to(dtype)
        value, gate = x.double().chunk(2, -1)
        return (x,), value * F.gelu(gate)
    x = (torch.randn(shape, generator=g) + mean).to(dtype)
    weight, bias = torch.randn(2, shape[-1], generator=g).to(dtype)
    more = weight.double(), bias.double()
    return (x, weight, bias), F.layer_norm(x.double(), shape[-1:], *more)


@interpreter
@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("longest", [8192, 16])  # rows in registers, and not
def test_rounded_mathematics(name, dtype, longest, monkeypatch):
    monkeypatch.setattr(_rows, "LONGEST", longest)
    for shape in ((1, 1), (7,), (2, 3, 63), (3, 127)):
        arguments, exact = case(name, shape, dtype)
        codes, scale = OPS[name](*arguments)
        assert codes.dtype == torch.int8 and codes.shape == shape
        largest = exact.abs().amax(-1)
        assert torch.allclose(scale.double(), largest / 127, rtol=2e-6, atol=1e-9)
        error = (codes * scale.unsqueeze(-1).double() - exact).abs()
        assert (error <= (0.5 + 1e-3) * largest.unsqueeze(-1) / 127 + 1e-9).all()


@interpreter
@both
def test_rows_that_are_strided_or_none(name):
    (x, *more), _ = case(name, (5, 20))
    for other in (strided(x), x.t().contiguous().t()):
        for y, wanted in zip(OPS[name](other, *more), OPS[name](x, *more), strict=True):
            assert_same_bits(y, wanted)
    codes, scale = OPS[name](x[:0], *more)
    assert codes.shape == (0, 20) and scale.shape == (0,)


@interpreter
@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_surfaces_in_its_row(name, bad):
    (x, *more), _ = case(name, (3, 20))
    x[1, 4] = bad
    codes, scale = OPS[name](x, *more)
    assert scale.isnan().tolist() == [False, True, False] and not codes[1].any()


@interpreter
def test_a_large_mean_costs_no_digits():
    arguments, exact = case("layer_norm", (4, 320), mean=1000.0)
    codes, scale = layer_norm_quantize_triton(*arguments)
    assert (codes * scale[:, None] - exact).abs().max() < 0.6 * scale.max()


@interpreter
def test_neither_weight_nor_bias():
    x = torch.randn(3, 33, generator=torch.Generator().manual_seed(1))
    codes, scale = layer_norm_quantize_triton(x, None, None, 1e-6)
    wanted, wanted_scale = quantize_rows_triton(F.layer_norm(x, (33,), eps=1e-6))
    assert (codes.int() - wanted).abs().max() <= 1
    assert torch.allclose(scale, wanted_scale, rtol=1e-6)


@pytest.mark.slow
def test_interpreter():
    """Runs the tests above, in a process whose Triton interprets."""
    assert checks.interpreted(__file__) == 12 + 2 + 4 + 2


@pytest.mark.parametrize("architecture", checks.TARGETS)
def test_ahead_of_time(architecture, monkeypatch, tmp_path):
    """Rows of transformers, from the shortest to one that does not stay in registers."""

    def meta(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    with checks.compiling(architecture, monkeypatch, tmp_path) as kernels:
        for k in (320, 5120, 8192, 12288):
            layer_norm_quantize_triton(meta(4096, k), meta(k), meta(k))
            geglu_quantize_triton(meta(4096, 2 * k))
    assert len(kernels) == 8
    for kernel in kernels:
        checks.check_resources(kernel, architecture, tmp_path)


@both
def test_a_row_of_one_value_compiles(name, monkeypatch, tmp_path):
    """Triton makes constants of sizes that are 1."""
    arguments, _ = case(name, (1, 1))
    with checks.compiling("sm_90", monkeypatch, tmp_path) as kernels:
        OPS[name](*(t.to("meta") for t in arguments))
    assert len(kernels) == 1
