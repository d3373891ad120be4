# SPDX-License-Identifier: Apache-2.0
"""`group_norm` and `group_norm_quantize` on every backend, against torch and fp64 mathematics."""

import pytest
import torch
import torch.nn.functional as F
from quantized_twins import BACKENDS, FLOATS, assert_same_numbers, everywhere
from torch import Tensor

from zo_kernels.ops import group_norm, group_norm_quantize, quantize_rows, use_backend
from zo_kernels.testing import assert_close_to_math, assert_same_bits

SHAPES = ((1, 1, 1, 1), (2, 7, 3, 5), (3, 63, 1, 7), (1, 320, 16, 16), (2, 34, 33, 4))


def _case(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=generator) + mean).to(dtype)
    weight, bias = torch.randn(2, shape[1], generator=generator).to(dtype)
    shift = torch.randn(shape[:2], generator=generator).to(dtype)
    return x, weight, bias, shift


def _torch(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, groups: int) -> Tensor:
    return F.silu(torch.group_norm(x + shift[:, :, None, None], groups, weight, bias, 1e-5))


def _groups(channels: int) -> int:
    return next(g for g in (32, 17, 9, 7, 1) if channels % g == 0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape, dtype):
    x, weight, bias, shift = _case(shape, dtype)
    groups = _groups(shape[1])
    # Torch in fp32, rounded: what a kernel with fp32 inside is held to.
    theirs = _torch(x.float(), weight.float(), bias.float(), shift.float(), groups).to(dtype)
    exact = _torch(*(t.double() for t in (x, weight, bias, shift)), groups)
    ran = []
    for backend, y in everywhere(
        group_norm, x, groups, weight, bias, shift=shift, activation="silu"
    ):
        assert_close_to_math(y, theirs, exact)
        assert y.is_contiguous(memory_format=torch.channels_last)
        ran.append(backend)
    assert ran == BACKENDS


def test_a_large_mean_costs_no_digits():
    x, weight, bias, _ = _case((2, 32, 9, 9), torch.float32, mean=1000.0)
    exact = F.group_norm(x.double(), 4, weight.double(), bias.double())
    for backend, y in everywhere(group_norm, x, 4, weight, bias):
        assert (y.double() - exact).abs().max() < 5e-4, backend


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized_is_quantize_rows_of_the_floats(shape):
    x, weight, bias, shift = _case(shape, torch.float32)
    keywords = {"shift": shift, "activation": "silu"}
    arguments = (x, _groups(shape[1]), weight, bias)
    floats = dict(everywhere(group_norm, *arguments, **keywords))
    for backend, (codes, scale) in everywhere(group_norm_quantize, *arguments, **keywords):
        wanted, wanted_scale = quantize_rows(floats[backend], per_sample=True)
        assert_same_bits(scale, wanted_scale)
        assert_same_bits(codes, wanted)


@pytest.mark.parametrize("activation", ["none", "silu", "gelu"])
def test_every_isa_gives_the_same_bits(activation):
    x, weight, bias, shift = _case((2, 34, 33, 4), torch.float32)
    results = dict(everywhere(group_norm, x, 17, weight, bias, shift=shift, activation=activation))
    results.pop("reference")
    first, *others = results.values()
    for other in others:
        assert_same_bits(other, first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_surfaces(bad):
    x, weight, bias, _ = _case((2, 32, 4, 4), torch.float32)
    x[1, 5, 2, 2] = bad
    for _, y in everywhere(group_norm, x, 4, weight, bias, activation="silu"):
        assert y[0].isfinite().all() and y[1, :8].isnan().all() and y[1, 8:].isfinite().all()
    for backend, (codes, scale) in everywhere(group_norm_quantize, x, 4, weight, bias):
        assert_same_numbers(scale[1:], torch.tensor([float("nan")]), backend)
        assert scale[0].isfinite() and not codes[1].any()


def test_strided_input_changes_nothing():
    x, weight, bias, _ = _case((2, 32, 8, 6), torch.float32)
    strided = torch.empty(2, 32, 8, 12)[:, :, :, ::2].copy_(x)
    for backend, y in everywhere(group_norm, strided, 4, weight, bias):
        name, _, _ = backend.partition(" ")
        with use_backend(name):
            assert torch.allclose(y, group_norm(x, 4, weight, bias), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(2, 4, 3)}, ValueError, "x must be"),
        ({"x": torch.ones(2, 4, 3, 3, dtype=torch.int8)}, TypeError, "x must be"),
        ({"groups": 3}, ValueError, "groups must be positive and divide"),
        ({"groups": 0}, ValueError, "groups must be positive and divide"),
        ({"weight": torch.ones(5)}, ValueError, "weight must be"),
        ({"shift": torch.ones(4)}, ValueError, "shift must be"),
        ({"eps": float("nan")}, ValueError, "eps must be"),
        ({"activation": "relu"}, ValueError, "activation must be"),
    ],
)
@pytest.mark.parametrize("op", [group_norm, group_norm_quantize])
def test_bad_input(op, change, error, words):
    arguments = {"x": torch.ones(2, 4, 3, 3), "groups": 2, **change}
    with pytest.raises(error, match=words):
        op(**arguments)
