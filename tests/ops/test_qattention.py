# SPDX-License-Identifier: Apache-2.0
"""`qattention` on every backend, against fp64 mathematics and against bf16."""

import math

import pytest
import torch
import torch.nn.functional as F
from quantized_twins import BACKENDS, FLOATS, assert_same_numbers, everywhere
from torch import Tensor

from zo_kernels.ops import qattention

# batch, queries, keys, heads, channels of a head: whole and broken tiles, blocks of keys and panels
SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 7, 3, 3, 5),
    (1, 13, 129, 2, 40),
    (1, 200, 77, 1, 63),
    (1, 6, 300, 2, 160),
    (3, 64, 64, 4, 32),
)


def _case(shape: tuple[int, ...], spread: float = 1.5, dtype=torch.float32) -> tuple[Tensor, ...]:
    batch, queries, keys, heads, depth = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = (queries, spread), (keys, spread), (keys, 1.0)
    return tuple(
        (torch.randn(batch, n, heads * depth, generator=generator) * by).to(dtype)
        for n, by in sizes
    )


def _exact(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    parts = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_near_mathematics(shape, dtype):
    case, heads = _case(shape, dtype=dtype), shape[3]
    exact = _exact(*case, heads)
    # Values are rounded to 1/1023, scores to about 1/5000 of the largest, and the result to dtype.
    bound = 4e-3 + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    ran = []
    for backend, y in everywhere(qattention, *case, heads):
        assert y.dtype == dtype and y.is_contiguous() and y.shape == case[0].shape
        assert (y.double() - exact).norm() <= bound * exact.norm(), backend
        ran.append(backend)
    assert ran == BACKENDS


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(shape):
    results = dict(everywhere(qattention, *_case(shape), shape[3]))
    first = results.get("cpp scalar")
    for backend, y in results.items():
        if backend.startswith("cpp"):
            assert_same_numbers(y, first, backend)


def test_closer_than_bf16_attention():
    query, key, value = _case((1, 128, 512, 4, 64), spread=2.0)
    exact = _exact(query, key, value, 4)
    halves = (t.bfloat16().unflatten(-1, (4, -1)).transpose(1, 2) for t in (query, key, value))
    theirs = F.scaled_dot_product_attention(*halves).transpose(1, 2).flatten(2).double()
    for backend, y in everywhere(qattention, query, key, value, 4):
        assert (y.double() - exact).norm() < 0.5 * (theirs - exact).norm(), backend


def test_a_long_tail_of_small_weights_keeps_its_mass():
    # One key has half of the weight, 2048 others share the rest: 4 codes each.
    key = torch.zeros(1, 2049, 4)
    key[0, 700] = math.log(2048)
    value = torch.ones(1, 2049, 4)
    value[0, 700] = -1
    query = torch.full((1, 3, 4), 0.25)
    for backend, y in everywhere(qattention, query, key, value, 1, scale=1.0):
        assert y.abs().max() < 2e-2, backend


def test_samples_do_not_meet():
    case = _case((3, 20, 30, 2, 8))
    alone = tuple(t[1:2].clone() for t in case)
    beside = tuple(torch.cat((t[:1] * 1e3, t[1:2], t[2:] * 0)) for t in case)
    for (backend, y), (_, both) in zip(
        everywhere(qattention, *alone, 2), everywhere(qattention, *beside, 2), strict=True
    ):
        assert_same_numbers(both[1:2], y, backend)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_surfaces(bad):
    query, key, value = _case((1, 9, 20, 2, 8))
    spoilt = query.clone()
    spoilt[0, 4, 3] = bad
    for backend, y in everywhere(qattention, spoilt, key, value, 2):
        assert y[0, 4, :8].isnan().all() and y.isnan().sum() == 8, backend
    spoilt = key.clone()
    spoilt[0, 4, 3] = bad
    for backend, y in everywhere(qattention, query, spoilt, value, 2):
        assert y[..., :8].isnan().all() and not y[..., 8:].isnan().any(), backend
    spoilt = value.clone()
    spoilt[0, 4, 3] = bad
    for backend, y in everywhere(qattention, query, key, spoilt, 2):
        assert y[..., 3].isnan().all() and y.isnan().sum() == 9, backend


def test_zeros_are_an_even_mean():
    value = torch.linspace(-1, 1, 5 * 6).view(1, 5, 6)
    zeros = torch.zeros(1, 2, 6), torch.zeros(1, 5, 6)
    for backend, y in everywhere(qattention, *zeros, value, 2):
        assert (y - value.mean(1, keepdim=True)).abs().max() < 2e-3, backend


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(2, 3, 8, dtype=torch.int8)}, TypeError, "query must be"),
        ({"query": torch.ones(3, 8)}, ValueError, r"query must be \[B, M, heads \* D\]"),
        ({"heads": 3}, ValueError, "heads must be positive and divide the 8 channels"),
        ({"heads": 0}, ValueError, "heads must be positive"),
        ({"key": torch.ones(2, 0, 8), "value": torch.ones(2, 0, 8)}, ValueError, "key must be"),
        ({"value": torch.ones(2, 4, 8)}, ValueError, "value must be"),
        ({"key": torch.ones(1, 5, 8)}, ValueError, "key must be"),
        ({"key": torch.ones(2, 5, 8).half()}, TypeError, "key must be"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
    ],
)
def test_bad_input(change, error, message):
    good = {"query": torch.ones(2, 3, 8), "key": torch.ones(2, 5, 8), "value": torch.ones(2, 5, 8)}
    with pytest.raises(error, match=message):
        qattention(**good | {"heads": 2} | change)
