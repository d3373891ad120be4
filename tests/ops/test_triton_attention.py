# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `qattention` without a GPU: interpreted, or compiled ahead of time."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from zo_kernels.ops.qattention import DEEPEST, qattention_ref
from zo_kernels.testing import assert_same_bits

pytest.importorskip("triton")
checks = pytest.importorskip("triton_checks")
from zo_kernels.kernels import qattention as attention  # noqa: E402
from zo_kernels.kernels._attention import KEYS  # noqa: E402
from zo_kernels.kernels.qattention import padded_depth, qattention_triton, tiles  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, queries, keys, heads, channels of a head: whole and broken tiles and blocks of keys, depths
# of one and of two powers of two
SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 7, 3, 3, 5),
    (1, 13, 129, 2, 40),
    (1, 140, 77, 1, 63),
    (1, 6, 70, 1, 160),
    (2, 32, 64, 2, 32),
)


def interpreter(test):
    return checks.quiet(pytest.mark.interpreter(pytest.mark.usefixtures("rounded")(test)))


def case(shape, dtype=torch.float32, spread=1.5):
    batch, queries, keys, heads, depth = shape
    g = torch.Generator().manual_seed(sum(shape))
    sizes = (queries, spread), (keys, spread), (keys, 1.0)
    return tuple(
        (torch.randn(batch, n, heads * depth, generator=g) * by).to(dtype) for n, by in sizes
    )


def mathematics(query, key, value, heads, scale=None):
    parts = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(*parts, scale=scale).transpose(1, 2).flatten(2)


def run(query, key, value, heads, scale=None):
    return qattention_triton(query, key, value, heads, scale or (query.shape[2] / heads) ** -0.5)


@interpreter
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[2], dtype) for dtype in DTYPES[1:]],
    ids=str,
)
def test_within_the_bound_of_the_op(shape, dtype):
    """And for floats of 32 bits no further from mathematics than the fixed point of the CPU."""
    arguments, heads = case(shape, dtype), shape[3]
    exact = mathematics(*arguments, heads)
    y = run(*arguments, heads)
    assert y.dtype == dtype and y.is_contiguous() and y.shape == arguments[0].shape
    error = (y.double() - exact).norm() / exact.norm()
    assert error <= 4e-3 + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    if dtype == torch.float32:
        fixed = qattention_ref(*arguments, heads, shape[4] ** -0.5)
        assert error <= 1.25 * (fixed.double() - exact).norm() / exact.norm() + 1e-4


@interpreter
def test_a_long_tail_of_small_weights_keeps_its_mass():
    # One key has half of the weight, 512 others share the rest.
    key = torch.zeros(1, 513, 4)
    key[0, 70] = math.log(512)
    value = torch.ones(1, 513, 4)
    value[0, 70] = -1
    y = run(torch.full((1, 3, 4), 0.25), key, value, 1, scale=1.0)
    assert y.abs().max() < 2e-3


@interpreter
def test_samples_do_not_meet():
    arguments = case((3, 20, 30, 1, 8))
    alone = run(*(t[1:2].clone() for t in arguments), 1)
    beside = run(*(torch.cat((t[:1] * 1e3, t[1:2], t[2:] * 0)) for t in arguments), 1)
    assert_same_bits(beside[1:2], alone)


@interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_surfaces():
    def spoilt(which, bad, *at):
        changed = [t.clone() for t in arguments]
        changed[which][at] = bad
        return run(*changed, 2).isnan()

    arguments = case((1, 9, 20, 2, 8))
    of_query, of_keys = spoilt(0, math.nan, 0, 4, 3), spoilt(1, math.inf, 0, 4, 3)
    of_values = spoilt(2, math.inf, 0, 4, 3)
    assert of_query[0, 4, :8].all() and of_query.sum() == 8
    assert of_keys[..., :8].all() and not of_keys[..., 8:].any()
    assert of_values[..., 3].all() and of_values.sum() == 9


@interpreter
def test_zeros_are_an_even_mean():
    value = torch.linspace(-1, 1, 5 * 6).view(1, 5, 6)
    y = run(torch.zeros(1, 2, 6), torch.zeros(1, 5, 6), value, 2)
    assert (y - value.mean(1, keepdim=True)).abs().max() < 1e-3


@interpreter
@pytest.mark.parametrize("scale", [-0.3, 0.7])
def test_any_scale_and_any_magnitude(scale):
    query, key, value = case((1, 5, 20, 1, 24))
    exact = mathematics(query, key, value, 1, scale)
    for by in (2.0**-60, 1.0, 2.0**60):
        y = run(query * by, key / by, value * by, 1, scale)
        assert ((y / by).double() - exact).norm() <= 4e-3 * exact.norm()


@interpreter
def test_strided_and_empty():
    """Queries, keys and values side by side are read where they lie."""
    parts = case((2, 6, 6, 2, 8))
    together = torch.cat(parts, -1)
    wanted = run(*parts, 2)
    assert_same_bits(run(*together.chunk(3, -1), 2), wanted)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in parts]
    assert_same_bits(run(*turned, 2), wanted)
    assert run(*(t[:0] for t in parts), 2).shape == (0, 6, 16)


@pytest.mark.slow
def test_interpreter():
    """Runs the tests above, in a process whose Triton interprets."""
    assert checks.interpreted(__file__) == 8 + 1 + 1 + 1 + 1 + 2 + 1


PRODUCT = {
    "sm_80": r"mma\.sync.*f32\.f16\.f16\.f32",
    "sm_90": r"wgmma\..*f32\.f16\.f16",
    "gfx942": r"v_mfma_f32_\w+_f16",
}
# Of Stable Diffusion 1.5 (depths 40 and 160, its own tokens and a text's), of Flux (128), and the
# deepest; and what they are compiled for.
COMPILED = (
    ("sm_80 sm_90 gfx942", (2, 4096, 4096, 8, 40)),
    ("sm_90", (2, 64, 77, 8, 160)),
    ("sm_80 gfx942", (1, 4608, 4608, 24, 128)),
    ("sm_80", (1, 256, 256, 2, DEEPEST)),
)
CASES = [
    (architecture, shape)
    for architectures, shape in COMPILED
    for architecture in architectures.split()
    if architecture in checks.TARGETS
]


@pytest.mark.parametrize(("architecture", "shape"), CASES)
def test_ahead_of_time(architecture, shape, monkeypatch, tmp_path):
    batch, queries, keys, heads, depth = shape
    arguments = [
        torch.empty(batch, n, heads * depth, dtype=torch.bfloat16, device="meta")
        for n in (queries, keys, keys)
    ]
    with checks.compiling(architecture, monkeypatch, tmp_path) as kernels:
        run(*arguments, heads)
    assert len(kernels) == 3
    for kernel in kernels:
        checks.check_resources(kernel, architecture, tmp_path)
    text = kernels[-1].asm["amdgcn" if architecture == "gfx942" else "ptx"]
    assert re.search(PRODUCT[architecture], text)


def test_tiles():
    for queries in (1, 7, 64, 77, 4096):
        for depth in range(1, DEEPEST + 1):
            high, low = padded_depth(depth)
            assert depth <= high + low < 2 * max(depth, 16)
            cut = tiles(queries, high + low)
            assert KEYS % cut.n == 0 and cut.m >= 16
    assert padded_depth(40) == (32, 16) and padded_depth(160) == (128, 32)
    assert padded_depth(64) == padded_depth(63) == (64, 0)
    assert attention.tiles(4096, 64).m == 128
