# SPDX-License-Identifier: Apache-2.0
"""`qlinear` of few rows in CUDA C++ without a GPU: its code, compiled for the host, against exact
sums and against fp64 mathematics. `test_cuda_cpp` compiles it by nvcc."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from cuda_checks import host_twin
from quantized_twins import Weight

from zo_kernels import _native
from zo_kernels.ops import _quantized, qlinear
from zo_kernels.ops._updates import DTYPES
from zo_kernels.packing import pack
from zo_kernels.testing import assert_close_to_math, assert_same_bits

pytest.importorskip("triton")
from zo_kernels.kernels import _few_rows
from zo_kernels.kernels.qlinear import qlinear_triton

HALVES = (torch.bfloat16, torch.float16)
# Multiprocessors, and whether blocks come in clusters: an H200, an A100, and what cuts otherwise.
GPUS = ((132, True), (108, False), (1, False), (3, True))
ROWS = (1, 2, 5, 8, 9, 16)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return host_twin("qlinear_twin", tmp_path_factory.mktemp("twin"))


def run(twin, x, weight, bias=None, out=torch.float32, gpu=GPUS[0]):
    """As the op does."""
    (m, k), n = x.shape, weight.shape[0]
    arguments = weight.arguments
    y = torch.full((m, n), float("nan"), dtype=out)
    dtypes = (x.dtype, out if bias is None else bias.dtype, out)
    numbers = torch.tensor([
        *(m, n, k, weight.groups, weight.bits, *(DTYPES.index(dtype) for dtype in dtypes), *gpu)
    ])  # fmt: skip
    tensors = (x, arguments["qweight"], weight.scale.contiguous(), weight.zero_point, bias, y)
    assert all(t is None or t.is_contiguous() for t in tensors)
    assert x.data_ptr() % 16 == arguments["qweight"].data_ptr() % 16 == 0
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (*tensors, numbers)]
    twin.zo_qlinear(*pointers)
    return y


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cut(twin, n, k, processors, clusters):
    """Rows of a block, and blocks of a cluster."""
    found = torch.zeros(2, dtype=torch.int64)
    sizes = (ctypes.c_int64(v) for v in (n, k, processors, clusters))
    twin.zo_qlinear_cut(*sizes, ctypes.c_void_p(found.data_ptr()))
    warps, ranks = found.tolist()
    return 32 * warps, ranks


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (8, 5), (4, 1), (4, 5), (4, 10)])
def test_whole_numbers_have_exact_sums(twin, bits, groups, zero, dtype):
    """Every row, channel, group and output is where it belongs, however the product is cut."""
    for n, k in ((7, 64), (40, 320), (200, 640), (40, 1280)):
        parts = groups if k // 64 % groups == 0 else 1
        weight = Weight((n, k), bits, parts, zero)
        weight.scale = 2.0 ** torch.randint(-1, 2, weight.scale.shape)
        x = torch.randint(-3, 4, (16, k), generator=torch.Generator().manual_seed(n)).to(dtype)
        exact = x.double() @ weight.real().T
        assert exact.abs().max() < 2**22
        for m, gpu in zip(ROWS, GPUS * 2, strict=False):
            y = run(twin, x[:m].contiguous(), weight, gpu=gpu)
            assert_same_bits(y, exact[:m].float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_code_is_exact_with_every_zero_point(twin, bits, dtype):
    low = -(2 ** (bits - 1))
    for first in range(low, -low, 16):
        weight = Weight((256, 64), bits)
        weight.codes[:, 16:32] = torch.arange(first, first + 16)
        weight.scale = torch.ones(256)
        x = torch.eye(64, dtype=dtype)[16:32].contiguous()
        codes = weight.codes[:, 16:32].T.float()
        assert_same_bits(run(twin, x, weight), codes)
        weight.zero_point = torch.arange(-128, 128).to(torch.int8)
        assert_same_bits(run(twin, x, weight), codes - weight.zero_point.float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (8, 5), (4, 1), (4, 10)])
def test_close_to_the_mathematics(twin, bits, groups, zero, dtype):
    weight, bias = Weight((100, 640), bits, groups, zero), randn(100, dtype=dtype)
    real = weight.real()
    for m, gpu in zip((1, 5, 9, 16), GPUS, strict=True):
        x = randn(m, 640, dtype=dtype)
        exact = x.double() @ real.T
        y = run(twin, x, weight, out=dtype, gpu=gpu)
        assert_close_to_math(y, F.linear(x, real.to(dtype)), exact)
        y = run(twin, x, weight, bias, dtype, gpu)
        assert_close_to_math(y, F.linear(x, real.to(dtype), bias), exact + bias.double())
        y = run(twin, x, weight, bias, gpu=gpu)
        wanted = qlinear(x.float(), **weight.arguments, bias=bias.float())
        assert_close_to_math(y, wanted, exact + bias.double())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_dtypes(twin, out, bias_dtype, dtype):
    weight, x, bias = Weight((17, 128)), randn(3, 128, dtype=dtype), randn(17, dtype=bias_dtype)
    sums = run(twin, x, weight)
    assert_same_bits(run(twin, x, weight, bias, out), (sums + bias.float()).to(out))


def test_a_row_has_the_same_bits_alone_and_among_others(twin):
    weight, x = Weight((70, 640), 4, 5), randn(16, 640, dtype=torch.bfloat16)
    together = run(twin, x, weight)
    for i in (0, 7, 8, 15):
        assert_same_bits(run(twin, x[i : i + 1].contiguous(), weight), together[i : i + 1])


def test_what_is_not_finite_surfaces_where_it_is(twin):
    weight, x = Weight((40, 128), 4, 2), randn(9, 128, dtype=torch.float16)
    weight.codes[:, 3] = 1
    usual, others = run(twin, x, weight), torch.arange(9) != 4
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[4, 3] = value
        y = run(twin, bad, weight)
        assert not y[4].isfinite().any()
        assert_same_bits(y[others], usual[others])
    weight.scale[1, 1] = float("nan")
    y = run(twin, x, weight)
    assert y[:, 1].isnan().all() and y[:, 2:].isfinite().all()


def test_cuts(twin):
    """Every multiprocessor has a block where that can be, and no block is lower than it must be."""
    assert cut(twin, 4096, 4096, *GPUS[0]) == (128, 8)
    assert cut(twin, 12288, 3072, *GPUS[0]) == (128, 2)
    assert cut(twin, 1280, 1280, *GPUS[0]) == (64, 8)
    assert cut(twin, 4096, 4096, *GPUS[1]) == (32, 1)
    assert cut(twin, 7, 64, *GPUS[1]) == (32, 1)
    for n in (1, 100, 1280, 4096, 30_000):
        for k in (64, 640, 4096):
            for gpu in GPUS:
                rows, ranks = cut(twin, n, k, *gpu)
                assert rows in (32, 64, 128) and ranks in ((1, 2, 4, 8) if gpu[1] else (1,))
                assert rows == 32 or -(-n // rows) * ranks >= gpu[0]


def call(k=128, groups=2, dtype=torch.bfloat16, **more):
    weight = Weight((20, k), 4, groups)
    return _quantized.Call(torch.ones(4, k, dtype=dtype), **weight.arguments)._replace(**more)


def test_what_triton_has_to_run():
    assert _few_rows.supports(call()) is None
    assert _few_rows.supports(call(bias=torch.ones(20), out_dtype=torch.float32)) is None
    assert _few_rows.supports(call(x=torch.ones(2, 8, 128).half())) is None
    for refused, why in (
        (call(dtype=torch.float32), "only for bfloat16 or float16 x"),
        (call(act_bits=8), "that is not rounded"),
        (call(x=torch.ones(17, 128).half()), "only for 1 to 16 rows"),
        (call(x=torch.ones(0, 128).half()), "only for 1 to 16 rows"),
        (call(perturb="scale"), "only without a perturbation or an activation"),
        (call(activation="silu"), "only without a perturbation or an activation"),
        (call(in_scale=torch.ones(128)), "only without in_scale or residual"),
        (call(residual=torch.ones(4, 20)), "only without in_scale or residual"),
        (call(k=96, groups=1), "only for groups of a multiple of 64 codes"),
        (call(groups=4), "only for groups of a multiple of 64 codes"),
        (call(x=torch.ones(129).half()[1:]), "only for addresses"),
    ):
        assert why in (_few_rows.supports(refused) or "")


@pytest.mark.skipif(_native.load_cuda() is None, reason="the CUDA C++ kernels were built")
def test_asked_for_and_not_built_is_an_error(monkeypatch):
    monkeypatch.setenv("ZO_CUDA_CPP", "1")
    with pytest.raises(RuntimeError, match="ZO_CUDA_CPP: the CUDA C\\+\\+ kernels must be there"):
        qlinear_triton(call())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (8, 5), (4, 1), (4, 10)])
def test_on_a_gpu(bits, groups, zero, dtype, monkeypatch):
    """Exact sums, launched by the op itself, and the same bits twice; compute-sanitizer runs it."""
    if (why := _native.load_cuda()) is not None:
        pytest.skip(why)
    seen = []
    cpp = _few_rows.few_rows_cpp
    monkeypatch.setattr(_few_rows, "few_rows_cpp", lambda call: seen.append(1) or cpp(call))
    monkeypatch.setenv("ZO_CUDA_CPP", "1")
    for n, k in ((40, 640), (1000, 1280), (5000, 640)):
        weight = Weight((n, k), bits, groups, zero)
        weight.scale = 2.0 ** torch.randint(-1, 2, weight.scale.shape)
        x = torch.randint(-3, 4, (16, k), generator=torch.Generator().manual_seed(n)).to(dtype)
        exact = (x.double() @ weight.real().T + 1).float()
        more = {k: v.cuda() if torch.is_tensor(v) else v for k, v in weight.arguments.items()}
        more |= {"bias": torch.ones(n, dtype=dtype).cuda(), "out_dtype": torch.float32}
        for m in ROWS:
            y = qlinear(x[:m].cuda(), **more)
            assert_same_bits(y.cpu(), exact[:m])
        x = torch.randn(16, k, dtype=dtype).cuda()
        assert_same_bits(qlinear(x, **more), qlinear(x, **more))
    assert len(seen) == 3 * (len(ROWS) + 2)


def test_packing_is_what_the_kernel_reads():
    """16 rows side by side, 4 bytes each: 16 bytes hold the same channels of 4 rows."""
    codes = torch.arange(16 * 64).view(16, 64).to(torch.int8)
    assert pack(codes).view(-1)[:16].tolist() == [
        (64 * row + c) % 256 ^ 128 for row in range(4) for c in range(4)
    ]
