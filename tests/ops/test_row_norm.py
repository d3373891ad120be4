# SPDX-License-Identifier: Apache-2.0
"""`layer_norm_quantize` and `geglu_quantize` on every backend, against fp64 mathematics."""

import math

import pytest
import torch
import torch.nn.functional as F
from quantized_twins import BACKENDS, FLOATS, assert_same_numbers, everywhere
from torch import Tensor

from zo_kernels.ops import geglu_quantize, layer_norm_quantize

SHAPES = ((1, 1), (7,), (3, 63), (2, 5, 320), (1, 4, 1280), (3, 1, 33))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def _case(function, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.5):
    """The op, its mathematics, and its arguments for a result of `shape`."""
    generator = torch.Generator().manual_seed(sum(shape))

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    if function is geglu_quantize:
        return _geglu, (numbers(*shape[:-1], 2 * shape[-1]),)
    x = (numbers(*shape) + mean).to(dtype)
    return _layer_norm, (x, numbers(shape[-1]), numbers(shape[-1]))


both = pytest.mark.parametrize("function", [layer_norm_quantize, geglu_quantize])


@both
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounded_mathematics(function, shape, dtype):
    mathematics, case = _case(function, shape, dtype)
    exact = mathematics(*(t.double() for t in case))
    largest = exact.abs().amax(-1)
    ran = []
    for backend, (codes, scale) in everywhere(function, *case):
        assert codes.dtype == torch.int8 and codes.shape == exact.shape
        assert scale.dtype == torch.float32 and scale.shape == exact.shape[:-1]
        assert torch.allclose(scale.double(), largest / 127, rtol=2e-6, atol=1e-9), backend
        # Half a code, and what fp32 leaves of digits.
        error = (codes * scale.unsqueeze(-1).double() - exact).abs()
        assert (error <= (0.5 + 1e-3) * largest.unsqueeze(-1) / 127 + 1e-9).all(), backend
        ran.append(backend)
    assert ran == BACKENDS


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(function, shape):
    results = dict(everywhere(function, *_case(function, shape, torch.float32)[1]))
    first = results.get("cpp scalar")
    for backend, (codes, scale) in results.items():
        if backend.startswith("cpp"):
            assert torch.equal(codes, first[0]), backend
            assert_same_numbers(scale, first[1], backend)


def test_a_large_mean_costs_no_digits():
    mathematics, case = _case(layer_norm_quantize, (4, 320), torch.float32, mean=1000.0)
    exact = mathematics(*(t.double() for t in case))
    for backend, (codes, scale) in everywhere(layer_norm_quantize, *case):
        assert (codes * scale[:, None] - exact).abs().max() < 0.6 * scale.max(), backend


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_surfaces_in_its_row(function, bad):
    _, (x, *rest) = _case(function, (3, 20), torch.float32)
    x[1, 4] = bad
    for backend, (codes, scale) in everywhere(function, x, *rest):
        assert scale.isnan().tolist() == [False, True, False], backend
        assert not codes[1].any(), backend


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layer_norm_quantize(torch.ones(3, dtype=torch.int8)), TypeError, "x must be"),
        (lambda: layer_norm_quantize(torch.ones(3, 0)), ValueError, r"x must be \[\.\.\., K\]"),
        (lambda: layer_norm_quantize(torch.ones(3), torch.ones(4)), ValueError, "weight must be"),
        (lambda: layer_norm_quantize(torch.ones(3), eps=-1.0), ValueError, "eps must be at least"),
        (lambda: geglu_quantize(torch.ones(3, dtype=torch.int8)), TypeError, "x must be"),
        (lambda: geglu_quantize(torch.ones(2, 5)), ValueError, r"x must be \[\.\.\., 2 K\]"),
        (lambda: geglu_quantize(torch.ones(())), ValueError, "x must be"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
