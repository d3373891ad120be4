# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels: every instruction set equals scalar, rounding is torch's, misuse is refused."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from zo_kernels import _native, rng
from zo_kernels._registry import cpp_available
from zo_kernels.ops import add_noise_
from zo_kernels.testing import SIZES, assert_same_bits, ran

C = _native.binding()
if C is None or (reason := cpp_available()) is not None:
    pytest.skip(f"C++ is {cpp_available()}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
ISAS = C.cpu_isas_available()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED, DRAWS, SCALES, DECAY = -5, [3, 2**40 + 1, -2], [1e-2, -0.3, 2.0], 0.9


@pytest.fixture(autouse=True)
def isa_afterwards():
    before = C.cpu_isa()
    yield
    C.set_isa(before)


@pytest.fixture(params=ISAS)
def isa(request):
    C.set_isa(request.param)
    with ran("add_noise_", "cpp"):
        yield request.param
    assert C.cpu_isa() == request.param


def op(params, streams=(0,), seed=1, draws=(), scales=(), decay=1.0, kind="normal", quanta=None):
    """The op as other programs may call it: nothing is checked before C++."""
    numbers = torch.tensor(scales, dtype=torch.float32), torch.tensor(decay, dtype=torch.float32)
    torch.ops.zo_kernels.add_noise_(params, streams, seed, draws, *numbers, kind, quanta)


def all_halves(dtype):
    """Every bit pattern of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def assert_same_numbers(actual, expected):
    """The same bits, but any nan equals any other."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_same_bits(actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("kind", rng.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_isa_equals_scalar(dtype, kind):
    sizes = [*SIZES, 100_003]  # the last takes several chunks
    streams = [2**32 - 1 - i for i in range(len(sizes))]

    def run(isa):
        C.set_isa(isa)
        whole = [torch.linspace(-3, 3, n + 1).to(dtype) for n in sizes]
        params = [x[1:] for x in whole]  # misaligned
        with ran("add_noise_", "cpp"):
            add_noise_(params, streams, SEED, DRAWS, SCALES, DECAY, kind)
        return torch.cat(whole)

    wanted = run("scalar")
    for isa in ISAS[1:]:
        assert_same_bits(run(isa), wanted)


@pytest.mark.parametrize("factor", [1.0, 0.5, 1 / 3, 2.0**-20, 3e4, -1.1])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounding_of_every_half(isa, dtype, factor):
    p = all_halves(dtype)
    wanted = (p.float() * torch.tensor(factor)).to(dtype)
    op([p], decay=factor)
    assert_same_numbers(p, wanted)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounding_where_it_is_close(isa, dtype):
    """x * (1 + 2^-k): near and on the middle between two neighbours, in both directions."""
    for k in range(5, 24):
        for factor in (1 + 2.0**-k, 1 - 2.0**-k):
            p = all_halves(dtype)
            wanted = (p.float() * torch.tensor(factor)).to(dtype)
            op([p], decay=factor)
            assert_same_numbers(p, wanted)


def test_special_fp32_values(isa):
    inf, nan = float("inf"), float("nan")
    p = torch.tensor([0.0, -0.0, inf, -inf, nan, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38] * 13)
    z = rng.noise(p.numel(), seed=1, draw=4, stream=0)
    wanted = p * torch.tensor(0.7) + torch.tensor(3e38) * z
    op([p], draws=[4], scales=[3e38], decay=0.7)
    assert_same_numbers(p, wanted)


@pytest.mark.parametrize("kind", rng.KINDS)
def test_terms_are_added_in_order_and_rounded_one_by_one(isa, kind):
    n, draws, scales = 300, list(range(40)), [(-1.7) ** j for j in range(40)]
    p = torch.linspace(-1, 1, n)
    total = np.float32(0.3) * p.numpy()
    for draw, scale in zip(draws, scales, strict=True):
        z = rng.noise_numpy(n, seed=1, draw=draw, stream=0, kind=kind)
        total = total + np.float32(scale) * z
    op([p], draws=draws, scales=scales, decay=0.3, kind=kind)
    assert_same_bits(p, torch.from_numpy(total))


def test_nothing_is_written_beside_a_parameter(isa):
    for kind in rng.KINDS:
        for n in (1, 17, 63, 65, 127, 129):
            whole = torch.full((n + 256,), 7.0)
            op([whole[128 : 128 + n]], draws=[0], scales=[1.0], kind=kind)
            assert (whole[:128] == 7).all() and (whole[128 + n :] == 7).all()
            assert (whole[128 : 128 + n] != 7).all()


def test_many_small_parameters_and_threads(isa):
    params = [torch.zeros(1 + i % 70) for i in range(1000)]
    wanted = [rng.noise_numpy(p.numel(), seed=1, draw=0, stream=i) for i, p in enumerate(params)]
    op(params, list(range(1000)), draws=[0], scales=[1.0])
    assert_same_bits(torch.cat(params), torch.from_numpy(np.concatenate(wanted)))


def test_a_strided_parameter(isa):
    p = torch.arange(600.0).view(20, 30).t()
    wanted = p.reshape(-1) + rng.noise(600, seed=1, draw=0, stream=0)
    op([p], draws=[0], scales=[1.0])
    assert p.stride() == (1, 30)
    assert_same_bits(p, wanted.view(30, 20))


def test_the_isa_in_use():
    assert set(ISAS) <= {"scalar", "avx2", "avx512"} and ISAS[0] == "scalar"
    for isa in ISAS:
        C.set_isa(isa)
        assert C.cpu_isa() == isa
    C.set_isa("auto")
    assert C.cpu_isa() == ISAS[-1]
    with pytest.raises(ValueError, match=r"set_isa: name must be one of auto scalar.*got 'mmx'"):
        C.set_isa("mmx")
    for isa in {"avx2", "avx512"} - set(ISAS):
        with pytest.raises(ValueError, match=rf"got {isa}, for which it lacks .*; choose another"):
            C.set_isa(isa)
    assert C.cpu_isa() == ISAS[-1]


def python(code, **environment):
    command = [sys.executable, "-W", "error", "-c", code]
    environment = os.environ | environment
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_isa_of_the_environment():
    show = "from zo_kernels import _native; print(_native.binding().cpu_isa())"
    for isa in ISAS:
        assert python(show, ZO_CPU_ISA=isa).stdout.strip() == isa
    assert python(show, ZO_CPU_ISA="auto").stdout.strip() == ISAS[-1]
    refused = python(show, ZO_CPU_ISA="mmx")
    assert refused.returncode != 0 and "set_isa: name must be one of" in refused.stderr


def test_the_binding_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, zo_kernels._C as C\n"
        "z = np.empty(3, np.float32)\n"
        "C.noise_into(z, seed=1, draw=0, stream=0)\n"
        "print(z.tolist())"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(rng.noise_numpy(3, seed=1, draw=0, stream=0).tolist())


def test_build_info():
    info = C.build_info()
    assert set(info) == {"compiler", "flags", "torch", "torch_target"}
    assert info["torch_target"] == "2.11"
    assert "-ffp-contract=off" in info["flags"]


def test_only_the_stable_abi_is_used():
    """No C++ symbol of libtorch is looked up at load time, so one build serves later versions."""
    names = loaded_names((Path(_native.__file__).parent / "_torch.so").read_bytes())
    assert b"torch_library_impl" in names
    unstable = (b"_ZN2at", b"_ZNK2at", b"_ZN3c10", b"_ZNK3c10", b"_ZN5torch3jit")
    assert [name for name in names if name.startswith(unstable)] == []


def loaded_names(library):
    """What the loader sees: strings of the table that is mapped, not those of local symbols."""
    if not library.startswith(b"\x7fELF\x02"):
        return library.split(b"\0")
    (table,) = struct.unpack_from("<Q", library, 0x28)
    size, count = struct.unpack_from("<HH", library, 0x3A)
    for at in range(table, table + size * count, size):
        _, kind, flags, _, offset, length = struct.unpack_from("<IIQQQQ", library, at)
        if kind == 3 and flags & 2:  # SHT_STRTAB, SHF_ALLOC
            return library[offset : offset + length].split(b"\0")
    raise AssertionError("no dynamic strings")


def read_only():
    x = np.zeros(3, np.float32)
    x.flags.writeable = False
    return x


BAD_ARRAYS = [
    (TypeError, np.zeros(3)),
    (TypeError, np.zeros(6, np.float32)[::2]),
    (TypeError, [0.0, 0.0]),
    (ValueError, read_only()),
]


@pytest.mark.parametrize(("error", "array"), BAD_ARRAYS, ids=["fp64", "strided", "list", "read"])
def test_noise_goes_into_writable_fp32_arrays_only(error, array):
    with pytest.raises(error):
        C.noise_into(array, seed=1, draw=0, stream=0)
    assert not np.any(array)


FREED = torch.ones(3)
FREED.untyped_storage().resize_(0)
W = torch.ones(3)
BAD = [
    ("streams must hold one id per parameter, got 2 for 1", {"streams": [0, 1]}),
    ("scales and decay must be contiguous float32", {"draws": [0, 1], "scales": [1.0]}),
    ("scales and decay must be contiguous float32", {"decay": [1.0, 2.0]}),
    ("quanta must be contiguous float32", {"quanta": torch.ones(2)}),
    ("kind must be normal or rademacher, got cauchy", {"kind": "cauchy"}),
    ("params must be float32, bfloat16 or float16", {"params": [W, W.double()], "streams": [0, 1]}),
    ("params must be on the CPU with their storage allocated, got params[0]", {"params": [FREED]}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message[:30] for message, _ in BAD])
def test_cpp_refuses_what_would_leave_its_memory(message, change):
    with pytest.raises(RuntimeError) as error:
        op(**({"params": [W]} | change))
    assert f"add_noise_: {message}" in str(error.value)
    assert_same_bits(W, torch.ones(3))


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"ZO_KERNELS_BUILD": "0"}, "ZO_KERNELS_BUILD=0"), ({"CXX": "no-c++"}, "no-c++ not found")],
)
def test_setup_says_why_it_builds_nothing(environment, reason):
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "zo-kernels"
    lines = [line for line in done.stderr.splitlines() if line.startswith("zo_kernels:")]
    assert lines == [f"zo_kernels: pure-Python install, C++ kernels are not built: {reason}"]
