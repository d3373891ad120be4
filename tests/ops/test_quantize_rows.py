# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
from quantized_twins import (
    FLOATS,
    assert_same_numbers,
    everywhere,
    misaligned,
    quantize_twin,
    strided,
)

from zo_kernels.ops import quantize_rows
from zo_kernels.testing import SIZES, assert_same_bits

INF, NAN = float("inf"), float("nan")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(x, per_sample=False, in_scale=None):
    rows = x.permute(0, 2, 3, 1) if per_sample else x.reshape(-1, x.shape[-1])
    codes, scale = quantize_twin(rows, in_scale)
    if per_sample:
        codes = codes.permute(0, 3, 1, 2)
    else:
        codes, scale = codes.view(x.shape), scale.view(x.shape[:-1])
    for backend, (got, got_scale) in everywhere(quantize_rows, x, per_sample, in_scale):
        assert_same_numbers(got_scale, scale, backend)
        assert got.dtype == torch.int8 and torch.equal(got, codes), backend
        assert got.permute(0, 2, 3, 1).is_contiguous() if per_sample else got.is_contiguous()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("k", SIZES)
def test_rows(k, dtype):
    x = (randn(5, k) * torch.tensor([[1], [1e-8], [1e4], [3e-3], [7]])).to(dtype)
    check(x)
    check(x, in_scale=randn(k, seed=1))
    check(strided(x))
    check(misaligned(x))
    check(x[:, :1].expand(5, k))


@pytest.mark.parametrize("m", SIZES)
def test_many_rows(m):
    check(randn(m, 63))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3, 9), (3, 63, 8, 8), (1, 127, 1, 33)])
def test_pictures(shape, dtype):
    x = randn(*shape).to(dtype)
    check(x, True)
    check(x, True, randn(shape[1], seed=1))
    check(x.to(memory_format=torch.channels_last), True)
    check(strided(x), True)
    check(misaligned(x), True)
    check(x.transpose(2, 3), True)


def test_a_large_picture():
    check(randn(2, 320, 32, 32), True)


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (2, 3, 7), (2, 3, 1, 7)], ids=str)
def test_leading_dimensions(shape):
    for backend, (codes, scale) in everywhere(quantize_rows, randn(*shape)):
        assert codes.shape == shape and scale.shape == shape[:-1], backend
    if 0 not in shape:
        check(randn(*shape))


def test_no_pictures():
    for _, (codes, scale) in everywhere(quantize_rows, torch.ones(0, 7, 3, 2), True):
        assert codes.shape == (0, 7, 3, 2) and scale.shape == (0,)


def test_ties_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5]])
    for _, (codes, scale) in everywhere(quantize_rows, x):
        assert codes.tolist() == [[127, 0, 2, 2, 0, -2, 126, -126]] and scale.tolist() == [1.0]


def test_the_error_is_half_a_step():
    x = randn(50, 200)
    for _, (codes, scale) in everywhere(quantize_rows, x):
        error = (codes.double() * scale.double()[:, None] - x.double()).abs()
        assert (error <= scale.double()[:, None] * (0.5 + 1e-4)).all()
        assert (codes.abs().amax(1) == 127).all()


def test_rows_that_are_not_finite_or_almost_zero():
    ordinary = [1.0, -2.0, 0.25, 3.0]
    special = [NAN, -NAN, INF, -INF, 3e38, 0.0, -0.0, 2.0**-100, 2.0**-101, 1e-45]
    x = torch.tensor(
        [ordinary, *([v, *ordinary[1:]] for v in special), *([v] * 4 for v in special)]
    )
    check(x)
    check(torch.cat([x] * 17, 1))
    check(x.view(-1, 4, 1, 1), True)
    codes, scale = quantize_rows(x)
    broken = ~x.isfinite().all(1)
    assert scale[broken].isnan().all() and not codes[broken].any()
    assert scale[~broken].isfinite().all()
    assert scale[-1] == 0 and not codes[-1].any()


def test_overflow_of_the_input_scale_is_nan():
    x, factor = torch.full((2, 3), 1e38), torch.tensor([1.0, 1e3, 1.0])
    check(x, in_scale=factor)
    assert quantize_rows(x, in_scale=factor)[1].isnan().all()


@pytest.mark.parametrize("per_sample", [False, True])
def test_rows_do_not_meet(per_sample):
    x = randn(6, 5, 4, 3)
    for whole, part in zip(
        everywhere(quantize_rows, x, per_sample),
        everywhere(quantize_rows, x[2:3], per_sample),
        strict=True,
    ):
        for a, b in zip(whole[1], part[1], strict=True):
            assert_same_bits(a[2:3], b)


def test_no_gradient_and_no_change_of_the_input():
    x = randn(3, 5).requires_grad_()
    before = x.detach().clone()
    codes, scale = quantize_rows(x)
    assert not codes.requires_grad and not scale.requires_grad
    assert_same_bits(x, before)


def test_compiles():
    compiled = torch.compile(quantize_rows, fullgraph=True, backend="aot_eager")
    for x, per_sample in ((randn(5, 7), False), (randn(2, 3, 4, 5), True)):
        for a, b in zip(compiled(x, per_sample), quantize_rows(x, per_sample), strict=True):
            assert_same_bits(a, b)
            assert a.stride() == b.stride()


X = torch.ones(2, 3)
PICTURE = torch.ones(2, 3, 4, 5)
BAD = [
    (TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int8", X.char()),
    (ValueError, "x must be [..., K] with at least one value for a scale", torch.tensor(1.0)),
    (ValueError, "x must be [..., K] with at least one value for a scale", X[:, :0]),
    (ValueError, "x must be [B, C, H, W] with at least one value for a scale", X, True),
    (ValueError, "x must be [B, C, H, W] with at least one", PICTURE[:, :0], True),
    (TypeError, "in_scale must be float32, got torch.float64", X, False, torch.ones(3).double()),
    (ValueError, "in_scale must be [3], got shape [2]", X, False, torch.ones(2)),
    (ValueError, "in_scale must be [3], got shape [5]", PICTURE, True, torch.ones(5)),
    (
        ValueError,
        "in_scale must be on the device of x (cpu), got meta",
        *(X, False, torch.ones(3, device="meta")),
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    kind, text, *args = BAD[case]
    with pytest.raises(kind, match=re.escape(f"quantize_rows: {text}")):
        quantize_rows(*args)
