# SPDX-License-Identifier: Apache-2.0
"""Random rounding to bf16 and fp16: unbiased, a neighbour always, special values, every backend."""

import numpy as np
import pytest
import torch

from zo_kernels import _arithmetic, rng
from zo_kernels._xp import Numpy, torch_
from zo_kernels.ops import add_noise_
from zo_kernels.testing import assert_same_bits
from zo_kernels.updates_numpy import add_noise_numpy

BF16, F16 = torch.bfloat16, torch.float16
DTYPES = {"bfloat16": BF16, "float16": F16}


def rounded(x, r, name):
    """fp32 x by the integers r, as tensors; numpy agrees."""
    bits = _arithmetic.round_randomly(torch_(), x, r, name)
    again = _arithmetic.round_randomly(Numpy, x.numpy(), r.numpy(), name)
    out = bits.view(DTYPES[name])
    assert_same_numbers(out, torch.from_numpy(again).view(DTYPES[name]))
    return out


def assert_same_numbers(x, y):
    assert torch.equal(x.isnan(), y.isnan())
    assert_same_bits(x.nan_to_num(nan=0.0), y.nan_to_num(nan=0.0))


def neighbours(x, dtype):
    """The largest number of dtype not above x and the smallest not below, in fp64."""
    near = x.to(dtype)
    inf = torch.tensor(float("inf"), dtype=dtype)
    down, up = torch.nextafter(near, -inf), torch.nextafter(near, inf)
    low = torch.where(near.double() <= x.double(), near, down)
    high = torch.where(near.double() >= x.double(), near, up)
    return low.double(), high.double()


RANGES = {"normal": (1e-3, 3e4), "subnormal of fp16": (2.0**-27, 2.0**-14)}


@pytest.mark.parametrize("where", RANGES)
@pytest.mark.parametrize("name", DTYPES)
def test_all_random_numbers_together_have_the_mean_x(name, where):
    """Over all 2^16 values of r the mean is x to the 2^-16 of a step that r resolves."""
    least, largest = RANGES[where]
    exponents = torch.linspace(0, 1, 50, dtype=torch.float64)
    x = (least * (largest / least) ** exponents).float()
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0])])
    r = torch.arange(2**16)
    for value in x:
        low, high = neighbours(value[None], DTYPES[name])
        got = rounded(value.expand(2**16).contiguous(), r, name).double()
        assert ((got == low) | (got == high)).all()
        assert abs(got.mean() - value.double()) <= (high - low) * 2.0**-16


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("value", [1.2345678, -37.77, 3.3e-5, -5.5e-7, 2.0**-25, 1.1e-38])
def test_the_mean_of_many_roundings_of_the_op(name, value):
    """Within the bound that the mean of 2^18 roundings exceeds once in a thousand times."""
    n, dtype = 2**18, DTYPES[name]
    p = torch.zeros(n, dtype=dtype)
    base = torch.tensor([value])
    # 0 * 0 + value * z with z = +-1, and the sign taken out afterwards
    add_noise_([p], [3], 5, [1], base, kind="rademacher", round_draw=2)
    z = rng.noise(n, seed=5, draw=1, stream=3, kind="rademacher")
    got = p.double() * z.double()
    low, high = (x.item() for x in neighbours(base, dtype))
    exact, step = base.double().item(), high - low
    assert ((got == low) | (got == high)).all()
    share = (exact - low) / step if step else 0.0
    bound = 3.29 * step * (share * (1 - share) / n) ** 0.5 + step * 2.0**-16
    assert abs(got.mean().item() - exact) <= bound


@pytest.mark.parametrize("name", DTYPES)
def test_numbers_of_the_dtype_stay(name):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[name])
    x = every.float()
    for r in (0, 65535):
        assert_same_numbers(rounded(x, torch.full((2**16,), r), name), every)


@pytest.mark.parametrize("name", DTYPES)
def test_beyond_the_largest_number_it_is_the_nearest(name):
    largest = torch.finfo(DTYPES[name]).max
    x = torch.tensor([largest * (1 + 2.0**-k) for k in range(8, 24)] + [3.4e38, float("inf")])
    x = torch.cat([x, -x])
    for r in (0, 30000, 65535):
        got = rounded(x, torch.full((len(x),), r), name)
        assert_same_bits(got, x.to(DTYPES[name]))


@pytest.mark.parametrize("name", DTYPES)
def test_every_half_times_a_factor_on_every_backend(name):
    """The op, on the C++ of this machine where it is built, equals numpy: also inf, nan, tiny."""
    from zo_kernels import _native
    from zo_kernels._registry import cpp_available

    isas = _native.binding().cpu_isas_available() if cpp_available() is None else []
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[name])
    for isa in isas:
        _native.binding().set_isa(isa)
        for factor in (1.0, 1 / 3, 2.0**-13, 1.7, 1 + 2.0**-9):
            p, twin = every.clone(), every.view(torch.int16).numpy().copy()
            twin = twin.view(np.uint16 if name == "bfloat16" else np.float16)
            add_noise_([p], [1], 5, [], [], factor, round_draw=77)
            add_noise_numpy(twin, 1, 5, [], [], factor, round_draw=77)
            assert_same_numbers(p, torch.from_numpy(twin.view(np.int16)).view(DTYPES[name]))
    if isas:
        _native.binding().set_isa("auto")


def test_small_steps_count_in_the_mean():
    """A step of a tenth of an ulp: to the nearest nothing moves, at random the mean does."""
    ulp = 2.0**-7
    near, random = (torch.ones(4096, dtype=BF16) for _ in range(2))
    for draw in range(100):
        for p, option in ((near, None), (random, 1000 + draw)):
            add_noise_([p], [0], 1, [], [], 1 + 0.1 * ulp, round_draw=option)
    assert (near == 1).all()
    mean = random.double().mean().item()
    assert abs(mean - (1 + 0.1 * ulp) ** 100) < 0.01
