# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.nn.functional as F
from quantized_twins import (
    BACKENDS,
    FLOATS,
    Weight,
    assert_same_numbers,
    everywhere,
    integer_twin,
    misaligned,
    quantize_twin,
    strided,
)

from zo_kernels.ops import qlinear, quantize_rows, use_backend
from zo_kernels.packing import pack
from zo_kernels.testing import SIZES, assert_close_to_math, assert_same_bits

INF, NAN = float("inf"), float("nan")
# bits, groups of 63 or 192 inputs, zero points
KINDS = [(8, 1, False), (8, 3, True), (4, 1, True), (4, 3, False), (8, 1, True), (4, 1, False)]


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_integers(x, weight, bias=None, in_scale=None, **more):
    """Bits of the twin, on every backend; their names."""
    codes, scale = quantize_twin(x.reshape(-1, x.shape[-1]), in_scale)
    out = more.get("out_dtype") or x.dtype
    residual = more.get("residual")
    flat = None if residual is None else residual.reshape(-1, residual.shape[-1])
    expected = integer_twin(codes, scale, weight, bias, flat, out=out)
    more |= weight.arguments | {"bias": bias, "in_scale": in_scale, "act_bits": 8}
    names = []
    for backend, y in everywhere(qlinear, x, **more):
        assert y.is_contiguous()
        assert_same_numbers(y, expected.view(*x.shape[:-1], -1), backend)
        names.append(backend)
    return names


def check_floats(x, weight, bias=None, in_scale=None):
    """At most twice the error of torch with a dequantized weight in the dtype of x."""
    real, dtype = weight.real(), x.dtype
    scaled = x if in_scale is None else x.float() * in_scale
    exact = scaled.double() @ real.T
    exact = exact if bias is None else exact + bias.double()
    by_torch = F.linear(scaled.to(dtype), real.to(dtype), None if bias is None else bias.to(dtype))
    names = []
    for backend, y in everywhere(qlinear, x, **weight.arguments, bias=bias, in_scale=in_scale):
        assert_close_to_math(y, by_torch, exact)
        names.append(backend)
    return names


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("bits", "groups", "zero"), KINDS)
def test_kinds(bits, groups, zero, dtype):
    for k in (63, 192):
        weight = Weight((33, k), bits, groups, zero)
        x, bias = randn(9, k, dtype=dtype), randn(33, dtype=dtype)
        check_integers(x, weight, bias)
        check_floats(x, weight, bias)
        check_floats(x, weight)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("axis", ["m", "n", "k"])
@pytest.mark.parametrize("bits", [8, 4])
def test_sizes(bits, axis, size):
    shape = {"m": 5, "n": 7, "k": 63} | {axis: size}
    weight, x = Weight((shape["n"], shape["k"]), bits), randn(shape["m"], shape["k"])
    check_integers(x, weight)
    check_floats(x, weight)


@pytest.mark.parametrize("m", [1, 2, 12, 13, 77, 257])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (8, 5), (4, 1), (4, 10), (4, 20)])
def test_shapes_of_models(bits, groups, zero, m):
    """Several panels, several blocks of K, groups of 640, 128, 64 and 32."""
    weight, x = Weight((320, 640), bits, groups, zero), randn(m, 640)
    assert check_integers(x, weight, randn(320)) == BACKENDS
    assert check_floats(x, weight, randn(320)) == BACKENDS


@pytest.mark.parametrize("bias_dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("x_dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("out", [*FLOATS, torch.float64, None], ids=str)
def test_dtypes(out, x_dtype, bias_dtype):
    weight, x = Weight((17, 40)), randn(6, 40, dtype=x_dtype)
    bias, residual = randn(17, dtype=bias_dtype), randn(6, 17, dtype=bias_dtype, seed=2)
    check_integers(x, weight, bias, out_dtype=out, residual=residual)
    for backend, y in everywhere(qlinear, x, **weight.arguments, residual=residual, out_dtype=out):
        assert y.dtype == (out or x_dtype), backend
        exact = x.double() @ weight.real().T + residual.double()
        coarsest = min((x_dtype, y.dtype), key=lambda dtype: -torch.finfo(dtype).eps)
        error = (y.double() - exact).abs().max() / exact.abs().max()
        assert error <= 4 * max(torch.finfo(coarsest).eps, 1e-7), backend


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales_that_are_given(bits):
    weight, x = Weight((20, 48), bits), randn(3, 2, 48)
    codes, scale = quantize_rows(x)
    for (_, direct), (backend, given) in zip(
        everywhere(qlinear, x, **weight.arguments, act_bits=8),
        everywhere(qlinear, codes, **weight.arguments, x_scale=scale),
        strict=True,
    ):
        assert given.dtype == torch.float32
        assert_same_numbers(given, direct, backend)
    codes = torch.full((2, 48), -128, dtype=torch.int8)  # which quantize_rows never makes
    expected = integer_twin(codes, torch.ones(2), weight)
    for backend, y in everywhere(qlinear, codes, **weight.arguments, x_scale=torch.ones(2)):
        assert_same_numbers(y, expected, backend)


def test_input_scale():
    weight, factor = Weight((20, 48), 4, 3), randn(48, seed=3).abs()
    for dtype in FLOATS:
        check_integers(randn(5, 48, dtype=dtype), weight, in_scale=factor)
        check_floats(randn(5, 48, dtype=dtype), weight, in_scale=factor)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_activations(act_bits, activation):
    """Judged on the sums that the same backend gives without one."""
    function = {"silu": F.silu, "gelu": F.gelu}[activation]
    weight, x, residual = Weight((300, 40)), 4 * randn(90, 40), randn(90, 300, seed=2)
    more = weight.arguments | {"act_bits": act_bits}
    for (_, plain), (_, y), (_, summed) in zip(
        everywhere(qlinear, x, **more),
        everywhere(qlinear, x, **more, activation=activation),
        everywhere(qlinear, x, **more, activation=activation, residual=residual),
        strict=True,
    ):
        assert_close_to_math(y, function(plain), function(plain.double()))
        assert_same_bits(summed, y + residual)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_far_from_zero(activation):
    """The sums are the values of x."""
    x = torch.tensor([0.0, 1e-30, 5.0, 20.0, 90.0, 1e4, 1e30, -1e-30, -5.0, -20.0, -90.0, -1e30])
    exact = {"silu": F.silu, "gelu": F.gelu}[activation](x.double())
    weight = {"qweight": pack(torch.ones(1, 1, dtype=torch.int8)), "scale": torch.ones(1)}
    for backend, y in everywhere(qlinear, x[:, None], **weight, activation=activation):
        close = torch.isclose(y[:, 0].double(), exact, rtol=3e-6, atol=2e-6)
        assert close.all(), (backend, y[~close], exact[~close])


@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (2, 0, 3), (2, 1, 1, 3)], ids=str)
def test_leading_dimensions(lead):
    weight, x = Weight((4, 6)), randn(*lead, 6)
    if 0 not in lead:
        check_integers(x, weight)
    for act_bits in (8, 16):
        for backend, y in everywhere(qlinear, x, **weight.arguments, act_bits=act_bits):
            assert y.shape == (*lead, 4), backend
            exact = x.double() @ weight.real().T
            torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("bits", [8, 4])
def test_strided_and_misaligned_inputs_change_nothing(bits, act_bits):
    weight, x = Weight((19, 70), bits, zero=True), randn(5, 70)
    more = weight.arguments | {"bias": randn(19), "residual": randn(5, 19), "act_bits": act_bits}
    for change in (strided, misaligned):
        changed = {
            k: change(v) if torch.is_tensor(v) and k != "qweight" else v for k, v in more.items()
        }
        changed["qweight"] = misaligned(more["qweight"])
        for (backend, y), (_, same) in zip(
            everywhere(qlinear, x, **more), everywhere(qlinear, change(x), **changed), strict=True
        ):
            if act_bits == 8:
                assert_same_numbers(same, y, backend)
            torch.testing.assert_close(same, y)
    for backend, y in everywhere(qlinear, x.T.contiguous().T, **more):
        torch.testing.assert_close(y, qlinear(x, **more), msg=backend)


def test_inputs_are_not_changed():
    weight = Weight((4, 6), zero=True)
    args = {"x": randn(5, 6), "bias": randn(4), "residual": randn(5, 4)} | weight.arguments
    before = {k: v.clone() for k, v in args.items() if torch.is_tensor(v)}
    for act_bits in (8, 16):
        for _ in everywhere(qlinear, **args, act_bits=act_bits):
            assert all(torch.equal(args[k], v) for k, v in before.items())


def test_the_largest_sum_fits():
    """K = 65536 products of 128 and 255, and one more is refused."""
    k = 65536
    codes = torch.full((1, k), -128, dtype=torch.int8)
    weight = {"qweight": pack(torch.full((1, k), 127, dtype=torch.int8)), "scale": torch.ones(1)}
    weight["zero_point"] = torch.tensor([-128], dtype=torch.int8)
    for backend, y in everywhere(qlinear, codes, **weight, x_scale=torch.ones(1)):
        assert y.item() == -128.0 * 255 * k, backend
    x = torch.ones(1, k + 1)
    weight["qweight"] = pack(torch.full((1, k + 1), 127, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"qlinear: K must be at most 65536 where .* got 65537"):
        qlinear(x, **weight, act_bits=8)
    torch.testing.assert_close(qlinear(x, **weight).item(), 255.0 * (k + 1))


def test_float16_sums_beyond_its_range_do_not_overflow():
    x = torch.full((1, 1024), 8.0, dtype=torch.float16)
    packed = pack(torch.full((1, 1024), 127, dtype=torch.int8))
    for act_bits in (8, 16):
        for _, y in everywhere(qlinear, x, packed, torch.tensor([1e-3]), act_bits=act_bits):
            torch.testing.assert_close(y, torch.tensor([[1040.384]], dtype=torch.float16))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_what_is_not_finite_surfaces_in_its_row_alone(act_bits, bits):
    weight, x = Weight((40, 70), bits), randn(9, 70)
    weight.codes[:, 3] = 1
    more = weight.arguments | {"act_bits": act_bits}
    for value in (NAN, INF, -INF):
        bad = x.clone()
        bad[4, 3] = value
        for (backend, y), (_, usual) in zip(
            everywhere(qlinear, bad, **more), everywhere(qlinear, x, **more), strict=True
        ):
            assert not y[4].isfinite().any(), backend
            assert y[4].isnan().all() or act_bits == 16, backend
            others = torch.arange(9) != 4
            assert_same_bits(y[others], usual[others])


def test_scales_that_are_not_finite_surface():
    weight, x = Weight((4, 6)), randn(5, 6)
    weight.scale[1] = NAN
    for act_bits in (8, 16):
        for backend, y in everywhere(qlinear, x, **weight.arguments, act_bits=act_bits):
            assert y[:, 1].isnan().all() and y[:, [0, 2, 3]].isfinite().all(), backend


def test_rows_of_zeros():
    weight, x = Weight((4, 6), zero=True), torch.zeros(3, 6)
    for act_bits in (8, 16):
        for _, y in everywhere(qlinear, x, **weight.arguments, act_bits=act_bits, bias=randn(4)):
            assert_same_bits(y, randn(4).expand(3, 4))


@pytest.mark.parametrize("act_bits", [8, 16])
def test_autocast_leaves_the_dtype_of_x(act_bits):
    weight, x = Weight((4, 6)), randn(5, 6)
    expected = qlinear(x, **weight.arguments, act_bits=act_bits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(qlinear(x, **weight.arguments, act_bits=act_bits), expected)


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_only_the_output_stays_allocated(backend, act_bits):
    weight, x = Weight((200, 300)), randn(5, 300)
    with torch.no_grad(), use_backend(backend), torch.profiler.profile(profile_memory=True) as seen:
        y = qlinear(x, **weight.arguments, act_bits=act_bits)
    events = {e.key: e for e in seen.key_averages()}
    kept = events["zo_kernels::qlinear"].cpu_memory_usage
    assert y.nbytes <= kept <= y.nbytes + 64 * 4  # the allocator rounds up


@pytest.mark.parametrize("act_bits", [8, 16])
def test_compiles_without_breaks_or_recompiles(act_bits):
    compiled = torch.compile(qlinear, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        weight, x = Weight((4, 6), seed=seed), randn(5, 6, seed=seed)
        more = weight.arguments | {"act_bits": act_bits, "bias": randn(4, seed=seed)}
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(x, **more), qlinear(x, **more))
