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
    patches,
    quantize_twin,
    strided,
)

from zo_kernels.ops import qconv2d, quantize_rows, use_backend
from zo_kernels.packing import pack
from zo_kernels.testing import SIZES, assert_close_to_math, assert_same_bits

INF, NAN = float("inf"), float("nan")
LAST = torch.channels_last
# kernel, geometry
GEOMETRIES = [
    ((1, 1), {}),
    ((1, 1), {"stride": 2}),
    ((3, 3), {}),
    ((3, 3), {"padding": 1}),
    ((3, 3), {"stride": 2, "padding": 1}),
    ((3, 3), {"stride": (2, 1), "padding": (0, 2)}),
    ((3, 3), {"padding": 2, "dilation": 2}),
    ((3, 3), {"padding": 4, "dilation": (1, 3)}),
    ((1, 3), {"padding": (0, 1)}),
    ((5, 2), {"padding": (3, 1), "stride": 3}),
    ((4, 4), {"stride": 4}),
]
# bits, scales for a tap, zero points
KINDS = [(8, 1, False), (8, 2, True), (4, 1, True), (4, 4, False), (8, 1, True), (4, 1, False)]


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_integers(x, weight, kernel, bias=None, in_scale=None, residual=None, out=None, **where):
    """Bits of the twin, on every backend; their names."""
    factor = None if in_scale is None else in_scale.view(-1, 1, 1)
    codes, scale = quantize_twin(x, factor)
    rows = patches(codes, kernel, **where)
    batch, height, width, k = rows.shape
    flat = None if residual is None else residual.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
    per_row = scale.repeat_interleave(height * width)
    expected = integer_twin(rows.view(-1, k), per_row, weight, bias, flat, out=out or x.dtype)
    expected = expected.view(batch, height, width, -1).permute(0, 3, 1, 2)
    more = {"bias": bias, "in_scale": in_scale, "residual": residual, "act_bits": 8}
    more |= {"out_dtype": out, "kernel_size": kernel} | weight.arguments | where
    names = []
    for backend, y in everywhere(qconv2d, x, **more):
        assert y.stride() == expected.stride()
        assert_same_numbers(y, expected, backend)
        names.append(backend)
    return names


def check_floats(x, weight, kernel, bias=None, in_scale=None, **where):
    """At most twice the error of torch with a dequantized weight in the dtype of x."""
    real, dtype = weight.real(), x.dtype
    scaled = x if in_scale is None else x.float() * in_scale.view(-1, 1, 1)
    exact = F.conv2d(scaled.double(), real, None if bias is None else bias.double(), **where)
    own = None if bias is None else bias.to(dtype)
    by_torch = F.conv2d(scaled.to(dtype), real.to(dtype), own, **where)
    more = {"bias": bias, "in_scale": in_scale, "kernel_size": kernel} | where
    names = []
    for backend, y in everywhere(qconv2d, x, **weight.arguments, **more):
        assert y.permute(0, 2, 3, 1).is_contiguous(), backend
        assert_close_to_math(y, by_torch, exact)
        names.append(backend)
    return names


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("kernel", "where"), GEOMETRIES, ids=str)
def test_geometries(kernel, where, dtype):
    weight, x, bias = Weight((18, 6, *kernel)), randn(3, 6, 9, 8, dtype=dtype), randn(18)
    check_integers(x, weight, kernel, bias, **where)
    check_floats(x, weight, kernel, bias, **where)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("bits", "parts", "zero"), KINDS)
def test_kinds(bits, parts, zero, padded):
    where = {"padding": int(padded)}
    weight, x = (
        Weight((18, 12, 3, 3), bits, 9 * parts if parts > 1 else 1, zero),
        randn(2, 12, 7, 9),
    )
    check_integers(x, weight, (3, 3), randn(18), **where)
    check_floats(x, weight, (3, 3), randn(18), **where)


@pytest.mark.parametrize("size", SIZES[:-1])
@pytest.mark.parametrize("axis", ["n", "c", "width"])
@pytest.mark.parametrize("bits", [8, 4])
def test_sizes(bits, axis, size):
    shape = {"n": 7, "c": 6, "width": 5} | {axis: size}
    weight = Weight((shape["n"], shape["c"], 3, 3), bits)
    x = randn(2, shape["c"], 3, shape["width"])
    check_integers(x, weight, (3, 3), padding=1)
    check_floats(x, weight, (3, 3), padding=1)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("bits", "parts"), [(8, 1), (8, 2), (4, 1), (4, 5)])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), 1), ((3, 3), 2), ((1, 1), 1)])
def test_shapes_of_models(kernel, stride, bits, parts, zero):
    """Several panels, several blocks of K, groups of 160 and 64."""
    taps = kernel[0] * kernel[1]
    weight = Weight((80, 320, *kernel), bits, taps * parts if parts > 1 else 1, zero)
    x, where = randn(2, 320, 16, 16).to(memory_format=LAST), {"stride": stride}
    where["padding"] = kernel[0] // 2
    assert check_integers(x, weight, kernel, randn(80), **where) == BACKENDS
    assert check_floats(x, weight, kernel, randn(80), **where) == BACKENDS


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("parts", [1, 9])
@pytest.mark.parametrize("groups", [2, 6])
def test_groups_of_channels(groups, parts, act_bits):
    """Each group is a convolution of its own; the scale of activations is that of the picture."""
    weight = Weight((12, 12 // groups, 3, 3), 8, parts, zero=True)
    x, where = randn(2, 12, 7, 9), {"kernel_size": 3, "padding": 1, "act_bits": act_bits}
    codes, scale = quantize_rows(x, per_sample=True)
    outputs = []
    for i, rows in enumerate(torch.arange(12).chunk(groups)):
        share = weight.arguments | {"qweight": pack(weight.codes[rows])}
        share |= {"scale": weight.scale[rows], "zero_point": weight.zero_point[rows]}
        given = {"x_scale": scale} if act_bits == 8 else {}
        part = (codes if act_bits == 8 else x).chunk(groups, 1)[i]
        outputs.append(qconv2d(part, **share, **where, **given))
    for _, y in everywhere(qconv2d, x, **weight.arguments, **where, groups=groups):
        torch.testing.assert_close(y, torch.cat(outputs, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("out", [*FLOATS, torch.float64, None], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_dtypes(dtype, out):
    weight, x = Weight((17, 6, 3, 3)), randn(2, 6, 5, 7, dtype=dtype)
    bias, residual = randn(17, dtype=dtype), randn(2, 17, 5, 7, dtype=dtype, seed=2)
    check_integers(x, weight, (3, 3), bias, residual=residual, out=out, padding=1)
    more = weight.arguments | {"residual": residual, "out_dtype": out, "kernel_size": 3}
    for backend, y in everywhere(qconv2d, x, **more, padding=1):
        assert y.dtype == (out or dtype), backend
        exact = F.conv2d(x.double(), weight.real(), padding=1) + residual.double()
        coarsest = max(torch.finfo(d).eps for d in (dtype, y.dtype))
        error = (y.double() - exact).abs().max() / exact.abs().max()
        assert error <= 4 * max(coarsest, 1e-7), backend


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales_that_are_given(bits):
    weight, x = Weight((20, 6, 3, 3), bits), randn(3, 6, 5, 4)
    codes, scale = quantize_rows(x, per_sample=True)
    more = weight.arguments | {"kernel_size": 3, "padding": 1}
    for change in (lambda t: t, torch.Tensor.contiguous):
        for (_, direct), (backend, given) in zip(
            everywhere(qconv2d, x, **more, act_bits=8),
            everywhere(qconv2d, change(codes), **more, x_scale=scale),
            strict=True,
        ):
            assert given.dtype == torch.float32
            assert_same_numbers(given, direct, backend)


def test_input_scale():
    weight, factor = Weight((20, 6, 3, 3), 4, 9), randn(6, seed=3).abs()
    for dtype in FLOATS:
        x = randn(2, 6, 5, 4, dtype=dtype)
        check_integers(x, weight, (3, 3), in_scale=factor, padding=1)
        check_floats(x, weight, (3, 3), in_scale=factor, padding=1)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_activations(act_bits, activation):
    """Judged on the sums that the same backend gives without one."""
    function = {"silu": F.silu, "gelu": F.gelu}[activation]
    weight, x = Weight((40, 16, 3, 3)), 4 * randn(2, 16, 16, 16)
    residual = randn(2, 40, 14, 14, seed=2)
    more = weight.arguments | {"act_bits": act_bits, "kernel_size": 3}
    for (_, plain), (_, y), (_, summed) in zip(
        everywhere(qconv2d, x, **more),
        everywhere(qconv2d, x, **more, activation=activation),
        everywhere(qconv2d, x, **more, activation=activation, residual=residual),
        strict=True,
    ):
        assert_close_to_math(y, function(plain), function(plain.double()))
        assert_same_bits(summed, y + residual)


@pytest.mark.parametrize("act_bits", [8, 16])
def test_empty_batch(act_bits):
    weight = Weight((8, 6, 3, 3))
    more = weight.arguments | {"kernel_size": 3, "padding": 1, "act_bits": act_bits}
    for backend, y in everywhere(qconv2d, torch.ones(0, 6, 9, 7), **more):
        assert y.shape == (0, 8, 9, 7), backend


@pytest.mark.parametrize("act_bits", [8, 16])
def test_layouts_change_nothing(act_bits):
    weight, x = Weight((19, 7, 3, 3), zero=True), randn(2, 7, 6, 5)
    more = weight.arguments | {"kernel_size": 3, "padding": 1, "act_bits": act_bits}
    more |= {"bias": randn(19), "residual": randn(2, 19, 6, 5)}
    changes = [strided, misaligned, lambda t: t.to(memory_format=LAST) if t.dim() == 4 else t]
    changes.append(
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() == 4 else t
    )
    for change in changes:
        changed = {
            k: change(v) if torch.is_tensor(v) and k != "qweight" else v for k, v in more.items()
        }
        changed["qweight"] = misaligned(more["qweight"])
        for (backend, y), (_, same) in zip(
            everywhere(qconv2d, x, **more), everywhere(qconv2d, change(x), **changed), strict=True
        ):
            assert same.permute(0, 2, 3, 1).is_contiguous()
            if act_bits == 8:
                assert_same_numbers(same, y, backend)
            torch.testing.assert_close(same, y)


def test_inputs_are_not_changed():
    weight = Weight((8, 6, 3, 3), zero=True)
    args = {"x": randn(2, 6, 5, 4), "bias": randn(8), "residual": randn(2, 8, 3, 2)}
    args |= weight.arguments
    before = {k: v.clone() for k, v in args.items() if torch.is_tensor(v)}
    for act_bits in (8, 16):
        for _ in everywhere(qconv2d, **args, kernel_size=3, act_bits=act_bits):
            assert all(torch.equal(args[k], v) for k, v in before.items())


def test_float16_sums_beyond_its_range_do_not_overflow():
    x = torch.full((1, 128, 3, 3), 8.0, dtype=torch.float16)
    packed = pack(torch.full((1, 128, 3, 3), 127, dtype=torch.int8))
    more = {"kernel_size": 3, "scale": torch.tensor([1e-3])}
    for act_bits in (8, 16):
        for _, y in everywhere(qconv2d, x, packed, **more, act_bits=act_bits):
            torch.testing.assert_close(y.flatten(), torch.tensor([1170.432], dtype=torch.float16))


@pytest.mark.parametrize("act_bits", [8, 16])
def test_pictures_of_a_batch_do_not_meet(act_bits):
    weight, x = Weight((19, 7, 3, 3)), randn(3, 7, 6, 5)
    more = weight.arguments | {"kernel_size": 3, "padding": 1, "act_bits": act_bits}
    for value in (NAN, INF):
        bad = x.clone()
        bad[1, 2, 3, 2] = value
        bad[2] *= 100
        for (backend, y), (_, usual) in zip(
            everywhere(qconv2d, bad, **more), everywhere(qconv2d, x, **more), strict=True
        ):
            touched = y[1] if act_bits == 8 else y[1, :, 2:5, 1:4]
            assert not touched.isfinite().any() or value == INF, backend
            assert touched.isnan().all() or act_bits == 16, backend
            assert_same_bits(y[0], usual[0])
            assert y[2].isfinite().all(), backend


@pytest.mark.parametrize("act_bits", [8, 16])
def test_autocast_leaves_the_dtype_of_x(act_bits):
    weight, x = Weight((8, 6, 3, 3)), randn(2, 6, 5, 4)
    more = weight.arguments | {"kernel_size": 3, "act_bits": act_bits}
    expected = qconv2d(x, **more)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(qconv2d(x, **more), expected)


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_only_the_output_stays_allocated(backend, act_bits):
    weight, x = Weight((64, 64, 3, 3)), randn(3, 64, 9, 7)
    more = weight.arguments | {"kernel_size": 3, "act_bits": act_bits}
    with torch.no_grad(), use_backend(backend), torch.profiler.profile(profile_memory=True) as seen:
        y = qconv2d(x, **more)
    events = {e.key: e for e in seen.key_averages()}
    kept = events["zo_kernels::qconv2d"].cpu_memory_usage
    assert y.nbytes <= kept <= y.nbytes + 64 * 4  # the allocator rounds up


@pytest.mark.parametrize("act_bits", [8, 16])
def test_compiles_without_breaks(act_bits):
    compiled = torch.compile(qconv2d, fullgraph=True, backend="aot_eager")
    weight, x = Weight((8, 6, 3, 3)), randn(2, 6, 5, 4)
    more = weight.arguments | {"kernel_size": 3, "padding": 1, "act_bits": act_bits}
    a, b = compiled(x, **more), qconv2d(x, **more)
    torch.testing.assert_close(a, b)
    assert a.stride() == b.stride()
