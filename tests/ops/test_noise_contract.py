# SPDX-License-Identifier: Apache-2.0
"""The noise contract: golden bits, the same bits from everyone, and what the numbers mean."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from zo_kernels import _native, rng
from zo_kernels._registry import cpp_available, use_backend
from zo_kernels.ops import add_noise_

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "noise.json").read_text())
GOLDEN_ROUNDING = json.loads((Path(__file__).parents[1] / "golden" / "rounding.json").read_text())
C = _native.binding()
ISAS = C.cpu_isas_available() if C is not None else []


@pytest.fixture(autouse=True)
def isa_afterwards():
    before = C.cpu_isa() if C is not None else None
    yield
    if before is not None:
        C.set_isa(before)


def by_torch(n, **where):
    return rng.noise(n, **where).numpy()


def by_binding(isa):
    def run(n, *, seed, draw, stream, kind, offset):
        C.set_isa(isa)
        assert C.cpu_isa() == isa
        out = np.full(n, np.nan, np.float32)
        C.noise_into(out, seed=seed, draw=draw, stream=stream, kind=kind, offset=offset)
        return out

    return run


BACKENDS = {"numpy": rng.noise_numpy, "torch": by_torch}
BACKENDS |= {f"_C {isa}": by_binding(isa) for isa in ISAS}


def bits(x):
    return x.view(np.uint32)


def test_every_backend_is_here():
    if (reason := cpp_available()) is not None:
        pytest.skip(f"C++ is {reason}")
    assert ISAS[0] == "scalar"
    assert len(BACKENDS) == 2 + len(ISAS)


@pytest.mark.parametrize("case", GOLDEN["philox"], ids=lambda case: case["words"][0])
def test_golden_words(case):
    wanted = tuple(int(word, 16) for word in case["words"])
    counter, key = tuple(case["counter"]), case["key"]
    assert rng.philox4x32(counter, key) == wanted
    arrays = rng.philox4x32(tuple(np.array([c], np.int64) for c in counter), key)
    assert tuple(int(word[0]) for word in arrays) == wanted
    tensors = rng.philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word[0]) for word in tensors) == wanted
    if C is not None:
        assert tuple(C.philox(counter, key)) == wanted
        assert tuple(C.philox(counter, key - 2**64)) == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_noise(backend):
    for case in GOLDEN["noise"]:
        where = {k: v for k, v in case.items() if k != "bits"}
        z = BACKENDS[backend](len(case["bits"]), **where)
        assert [f"{word:08x}" for word in bits(z).tolist()] == case["bits"], where


LENGTHS = (0, 1, 7, 63, 64, 65, 127, 128, 129, 1000, 4097)
# seed, draw, stream: small, and the ends of their ranges
PLACES = [(0, 0, 0), (1, 2, 3), (2**64 - 1, -(2**63), 2**32 - 1), (-(2**63), 2**63 - 1, 2**31)]


@pytest.mark.parametrize("kind", rng.KINDS)
def test_bit_equal_across_backends(kind):
    def check(n, **where):
        wanted = bits(rng.noise_numpy(n, **where))
        for name, backend in BACKENDS.items():
            got = bits(backend(n, **where))
            differ = np.flatnonzero(got != wanted)
            assert differ.size == 0, f"{name}: {differ.size} of {n} differ, {differ[:3]}, {where}"

    for i, n in enumerate(LENGTHS):
        for j, (seed, draw, stream) in enumerate(PLACES):
            last = rng.MAX_ELEMENTS[kind] - n  # the stream ends with these elements
            for offset in (0, (1, 17, 64, 127)[(i + j) % 4], 2**33 - 5, last):
                check(n, seed=seed, draw=draw, stream=stream, kind=kind, offset=offset)
    check(10**6, seed=2**63 + 11, draw=2**40 + 7, stream=99, kind=kind, offset=3)


@pytest.mark.parametrize("kind", rng.KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_the_op_adds_the_same_bits(isa, kind):
    if (reason := cpp_available()) is not None:
        pytest.skip(f"C++ is {reason}")
    n, where = 10**6, {"seed": 5, "draw": 2**35, "stream": 7}
    C.set_isa(isa)
    p = torch.full((n,), -0.0)  # -0 + z has the bits of z
    with use_backend("cpp"):
        add_noise_([p], [where["stream"]], where["seed"], [where["draw"]], [1.0], kind=kind)
    assert np.array_equal(bits(p.numpy()), bits(rng.noise_numpy(n, kind=kind, **where)))


def block_words(n, seed, draw, stream):
    """Words of Philox blocks 0, 1, ... by Python's own integers: [n, 4]."""
    counter = (draw & rng.WORD, (draw >> 32) & rng.WORD)
    return np.array([rng.philox4x32((b, stream, *counter), seed) for b in range(n)])


def test_normals_are_box_muller_in_fp64():
    groups, where = 40, {"seed": 2**60 + 1, "draw": 2**33 + 9, "stream": 12}
    words = block_words(16 * groups, **where)
    wanted = np.empty((groups, 4, 16))  # [group, output, block]
    for pair in range(2):
        radius_word, angle_word = words[:, 2 * pair], words[:, 2 * pair + 1]
        radius = np.sqrt(-2 * np.log((radius_word | 1) * 2.0**-32))
        fraction = angle_word & (2**30 - 1)
        f = (fraction - 2**30 * (fraction >> 29)) * 2.0**-29  # [-1, 1)
        sin, cos = np.sin(math.pi / 4 * f), np.cos(math.pi / 4 * f)
        cos = np.where(angle_word >> 31 == 1, -cos, cos)
        swap = (angle_word >> 30) & 1 == 1
        for half, direction in enumerate((np.where(swap, sin, cos), np.where(swap, cos, sin))):
            wanted[:, 2 * pair + half] = (radius * direction).reshape(groups, 16)
    z = rng.noise_numpy(64 * groups, **where)
    assert np.abs(z - wanted.reshape(-1)).max() < 2e-6


def test_signs_are_the_bits_of_the_words():
    blocks, where = 20, {"seed": 9, "draw": -4, "stream": 2**32 - 1}
    wanted = [
        1 - 2 * ((int(w) >> i) & 1) for w in block_words(blocks, **where).flat for i in range(32)
    ]
    assert rng.noise_numpy(128 * blocks, kind="rademacher", **where).tolist() == wanted


def test_random_bits_of_roundings_are_halves_of_the_words():
    groups, where = 5, {"seed": 2**63 + 9, "draw": -4, "stream": 2**32 - 1}
    words = block_words(16 * groups, **where)
    i = np.arange(128 * groups)
    word = words[16 * (i // 128) + i % 16, i // 16 % 4]
    wanted = np.where(i // 64 % 2 == 0, word & 0xFFFF, word >> 16)
    assert rng.round_bits_numpy(len(i), **where).tolist() == wanted.tolist()
    for offset in (0, 1, 127, 130):
        got = rng.round_bits(300, offset=offset, **where)
        assert got.tolist() == wanted[offset : offset + 300].tolist()


def test_golden_rounding():
    assert GOLDEN_ROUNDING
    for case in GOLDEN_ROUNDING:
        where = {k: v for k, v in case.items() if k != "bits"}
        r = rng.round_bits_numpy(len(case["bits"]), **where)
        assert [f"{word:04x}" for word in r.tolist()] == case["bits"], where


def test_random_bits_of_roundings_are_uniform():
    n = 2**20
    r = rng.round_bits_numpy(n, seed=1, draw=1, stream=1)
    assert r.min() == 0 and r.max() == 65535
    assert abs(r.mean() - 32767.5) < 5 * 65536 / math.sqrt(12 * n)
    for bit in range(16):
        assert abs((r >> bit & 1).mean() - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_extremes_of_the_radius():
    words = np.array([0, 1, 2, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFF7F, 0xFFFFFFFF], np.int64)
    got = rng._radius(rng._Numpy, words)
    u = (words | 1).astype(np.float32).astype(np.float64) * 2.0**-32
    np.testing.assert_allclose(got, np.sqrt(-2 * np.log(u)), rtol=1e-6, atol=1e-30)
    assert got[0] == got.max() and 6.66 < got[0] < 6.67
    assert got[-1] == 0
    assert np.array_equal(
        bits(got), bits(rng._radius(rng._torch(), torch.from_numpy(words)).numpy())
    )


@pytest.mark.parametrize("kind", rng.KINDS)
def test_moments(kind):
    """Each within five standard errors of its true value, for the fixed seed."""
    n = 2**20
    z = rng.noise_numpy(n, seed=1, draw=1, stream=1, kind=kind).astype(np.float64)
    assert abs(z.mean()) < 5 / math.sqrt(n)
    for other in (
        rng.noise_numpy(n, seed=2, draw=1, stream=1, kind=kind),
        rng.noise_numpy(n, seed=1, draw=2, stream=1, kind=kind),
        rng.noise_numpy(n, seed=1, draw=1, stream=2, kind=kind),
        *(np.roll(z, lag) for lag in (1, 16, 32, 64, 128)),
    ):
        assert abs((z * other).mean()) < 5 / math.sqrt(n)
    if kind == "rademacher":
        assert set(np.unique(z)) == {-1.0, 1.0}
        return
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for x in (0.5, 1.0, 2.0, 3.0, 4.0):
        tail = math.erfc(x / math.sqrt(2))
        assert abs((np.abs(z) > x).mean() - tail) < 5 * math.sqrt(tail / n)


BAD = [
    ({"kind": "cauchy"}, "kind must be"),
    ({"stream": -1}, "stream must be in [0, 2^32), got -1"),
    ({"stream": 2**32}, "stream must be in [0, 2^32), got 4294967296"),
    ({"offset": -1}, "elements must lie in [0, 17179869184)"),
    ({"offset": 2**34 - 2}, "elements must lie in [0, 17179869184)"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(change) for change, _ in BAD])
def test_errors(backend, change, message):
    where = {"seed": 0, "draw": 0, "stream": 0, "kind": "normal", "offset": 0} | change
    with pytest.raises(ValueError) as error:
        BACKENDS[backend](3, **where)
    assert message in str(error.value)
