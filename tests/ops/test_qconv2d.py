# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from zo_kernels.ops import qconv2d

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 63, 127, 1000)
GEOMETRIES = (
    {},
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2)},
    {"padding": 2, "dilation": 2},
    {"padding": 1, "groups": 2},
)


def layer(n=8, c=6, dtype=torch.float32, kernel=(3, 3), size=(9, 7), groups=1, zero_point=False):
    """x, qweight, scale, zero_point and bias of a layer with N(0, 1/fan-in) weights."""
    g = torch.Generator().manual_seed(0)
    fan_in = c // groups * kernel[0] * kernel[1]
    return (
        torch.randn(3, c, *size, generator=g).to(dtype),
        torch.randint(-127, 128, (n, c // groups, *kernel), dtype=torch.int8, generator=g),
        (torch.rand(n, generator=g) + 0.5) / (73 * fan_in**0.5),
        torch.randint(-128, 128, (n,), dtype=torch.int8, generator=g) if zero_point else None,
        torch.randn(n, generator=g).to(dtype),
    )


def column(vector):
    return vector.double()[:, None, None, None]


def dequantized(qweight, scale, zero_point=None):
    zero = 0 if zero_point is None else column(zero_point)
    return (qweight.double() - zero) * column(scale)


def exact(x, qweight, scale, zero_point=None, bias=None, **geometry):
    """The equation in fp64, on the same inputs."""
    weight = dequantized(qweight, scale, zero_point)
    return F.conv2d(x.double(), weight, None if bias is None else bias.double(), **geometry)


def error(y, truth):
    return (y.double() - truth).norm() / truth.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("zero_point", [False, True])
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(geometry, dtype, zero_point):
    args = layer(dtype=dtype, groups=geometry.get("groups", 1), zero_point=zero_point)
    x, qweight, scale, zero, bias = args
    truth = exact(*args, **geometry)
    weight = dequantized(qweight, scale, zero).to(dtype)
    torch_error = error(F.conv2d(x, weight, bias, **geometry), truth)
    y = qconv2d(*args, **geometry)
    assert y.dtype == dtype
    assert error(y, truth) <= 2 * torch_error + torch.finfo(dtype).eps


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("axis", ["n", "c", "width"])
def test_sizes(axis, size):
    shape = {"size": (3, size)} if axis == "width" else {axis: size}
    args = layer(**shape)
    truth = exact(*args, padding=1)
    torch.testing.assert_close(qconv2d(*args, padding=1).double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (5, 2)], ids=str)
def test_kernels(kernel):
    args = layer(kernel=kernel)
    torch.testing.assert_close(qconv2d(*args).double(), exact(*args), rtol=1e-5, atol=1e-5)


def test_empty_batch():
    x, *rest = layer()
    assert qconv2d(x[:0], *rest, padding=1).shape == (0, 8, 9, 7)


@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("weight_last", [False, True])
def test_memory_formats(x_last, weight_last):
    x, qweight, *rest = layer()
    expected = qconv2d(x, qweight, *rest, padding=1)
    x = x.to(memory_format=torch.channels_last) if x_last else x
    qweight = qweight.to(memory_format=torch.channels_last) if weight_last else qweight
    y = qconv2d(x, qweight, *rest, padding=1)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last) == (x_last or weight_last)


def test_inputs_are_not_changed():
    args = layer(zero_point=True)
    before = [t.clone() for t in args]
    qconv2d(*args)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_float16_sums_beyond_its_range_do_not_overflow():
    x = torch.full((1, 128, 3, 3), 8.0, dtype=torch.float16)
    qweight = torch.full((1, 128, 3, 3), 127, dtype=torch.int8)
    y = qconv2d(x, qweight, torch.tensor([1e-3]))  # the unscaled sum is 1,170,432
    torch.testing.assert_close(y.flatten(), torch.tensor([1170.432], dtype=torch.float16))


def test_samples_of_a_batch_do_not_meet():
    x, *rest = layer()
    x[0, 0, 0, 0] = float("nan")
    y = qconv2d(x, *rest, padding=1)
    assert y[0].isnan().any() and y[1:].isfinite().all()


def test_autocast_leaves_the_dtype_of_x():
    args = layer()
    expected = qconv2d(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(qconv2d(*args), expected)


def test_only_the_output_stays_allocated():
    x, qweight, scale, _, bias = layer(n=64, c=64)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        y = qconv2d(x, qweight, scale, bias=bias)
    events = {e.key: e for e in profile.key_averages()}
    kept = events["zo_kernels::qconv2d"].cpu_memory_usage
    assert y.nbytes <= kept <= y.nbytes + 64 * 4  # the allocator rounds up


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients_of_x_and_bias(geometry):
    args = layer(
        n=2,
        c=2,
        dtype=torch.float64,
        size=(5, 4),
        groups=geometry.get("groups", 1),
        zero_point=True,
    )
    x, qweight, scale, zero, bias = args

    def f(x, bias):
        return qconv2d(x, qweight, scale, zero, bias, **geometry)

    assert torch.autograd.gradcheck(f, (x.requires_grad_(), bias.requires_grad_()))


def test_gradient_of_scale_is_refused():
    x, qweight, scale, _, bias = layer()
    with pytest.raises(NotImplementedError, match="qconv2d: scale must not require a gradient"):
        qconv2d(x, qweight, scale.requires_grad_(), bias=bias)


def test_compiles_without_breaks():
    compiled = torch.compile(qconv2d, fullgraph=True, backend="aot_eager")
    x, qweight, *rest = layer()
    args = (x, qweight.to(memory_format=torch.channels_last), *rest)
    torch.testing.assert_close(compiled(*args, padding=1), qconv2d(*args, padding=1))


BAD = {
    "x int": ({"x": torch.ones(3, 6, 9, 7).int()}, TypeError, "x must be float32, "),
    "x 3d": ({"x": torch.ones(6, 9, 7)}, ValueError, r"x must be \[B, 6, H, W\]"),
    "x channels": ({"x": torch.ones(3, 5, 9, 7)}, ValueError, r"x must be \[B, 6, .*\(3, 5, 9, 7"),
    "x small": ({"x": torch.ones(3, 6, 2, 7)}, ValueError, "x must be at least 3 high .* got 2"),
    "codes float": ({"qweight": torch.ones(8, 6, 3, 3)}, TypeError, "qweight must be int8, got"),
    "codes 2d": (
        {"qweight": torch.ones(8, 54, dtype=torch.int8)},
        ValueError,
        r"qweight must be \[N, C / groups, kh, kw\], got shape \(8, 54\)",
    ),
    "scale shape": ({"scale": torch.ones(6)}, ValueError, r"scale must be \[8\], one value per"),
    "scale dtype": ({"scale": torch.ones(8).half()}, TypeError, "scale must be float32, got"),
    "zero dtype": ({"zero_point": torch.zeros(8)}, TypeError, "zero_point must be int8, got"),
    "bias shape": ({"bias": torch.ones(6)}, ValueError, r"bias must be \[8\], one value per"),
    "stride": ({"stride": 0}, ValueError, r"stride must be at least 1, got \(0, 0\)"),
    "padding": ({"padding": (1, -1)}, ValueError, r"padding must be at least 0, got \(1, -1\)"),
    "dilation": ({"dilation": 0}, ValueError, r"dilation must be at least 1, got \(0, 0\)"),
    "groups": ({"groups": 3}, ValueError, "groups must be positive and divide the 8 output"),
    "no groups": ({"groups": 0}, ValueError, "groups must be positive and divide the 8 output"),
    "device": (
        {"bias": torch.ones(8, device="meta")},
        ValueError,
        r"bias must be on the device of x \(cpu\), got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, kind, text = BAD[case]
    x, qweight, scale, _, bias = layer()
    args = {"x": x, "qweight": qweight, "scale": scale, "bias": bias}
    with pytest.raises(kind, match=f"qconv2d: {text}"):
        qconv2d(**{**args, **change})
