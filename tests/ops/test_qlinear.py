# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from zo_kernels.ops import qlinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 63, 127, 1000)


def layer(n, k, dtype=torch.float32, m=5, zero_point=False, seed=0):
    """x, qweight, scale, zero_point and bias of a layer with N(0, 1/K) weights."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(m, k, generator=g).to(dtype),
        torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g),
        (torch.rand(n, generator=g) + 0.5) / (73 * k**0.5),
        torch.randint(-128, 128, (n,), dtype=torch.int8, generator=g) if zero_point else None,
        torch.randn(n, generator=g).to(dtype),
    )


def exact(x, qweight, scale, zero_point=None, bias=None):
    """The equation in fp64, on the same inputs."""
    codes = qweight.double()
    if zero_point is not None:
        codes = codes - zero_point.double()[:, None]
    y = x.double() @ (codes * scale.double()[:, None]).T
    return y if bias is None else y + bias.double()


def error(y, truth):
    return (y.double() - truth).norm() / truth.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(s, 63) for s in SIZES] + [(7, s) for s in SIZES])
@pytest.mark.parametrize("zero_point", [False, True])
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(n, k, dtype, zero_point):
    x, qweight, scale, zero, bias = layer(n, k, dtype, zero_point=zero_point)
    truth = exact(x, qweight, scale, zero, bias)
    weight = exact(torch.eye(k), qweight, scale, zero).T.to(dtype)
    torch_error = error(F.linear(x, weight, bias), truth)
    y = qlinear(x, qweight, scale, zero, bias)
    assert y.dtype == dtype
    assert error(y, truth) <= 2 * torch_error + torch.finfo(dtype).eps


@pytest.mark.parametrize("m", SIZES)
def test_rows(m):
    args = layer(7, 63, m=m)
    torch.testing.assert_close(qlinear(*args).double(), exact(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions(lead):
    _, qweight, scale, _, bias = layer(4, 6)
    x = torch.randn(*lead, 6, generator=torch.Generator().manual_seed(1))
    y = qlinear(x, qweight, scale, bias=bias)
    assert y.shape == (*lead, 4)
    truth = exact(x, qweight, scale, bias=bias)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)


def test_strided_and_misaligned_inputs_change_nothing():
    x, qweight, scale, _, bias = layer(9, 14)
    expected = qlinear(x, qweight, scale, bias=bias)
    strided = torch.stack([x, x], 2)[..., 0]
    shifted = torch.cat([torch.zeros(1, dtype=torch.int8), qweight.flatten()])[1:].view(9, 14)
    assert not strided.is_contiguous() and shifted.storage_offset() == 1
    torch.testing.assert_close(qlinear(strided, shifted, scale, bias=bias), expected)
    assert torch.equal(qlinear(x, qweight.T.contiguous().T, scale, bias=bias), expected)


def test_inputs_are_not_changed():
    args = layer(4, 6, zero_point=True)
    before = [t.clone() for t in args]
    qlinear(*args)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_float16_sums_beyond_its_range_do_not_overflow():
    x = torch.full((1, 1024), 8.0, dtype=torch.float16)
    qweight = torch.full((1, 1024), 127, dtype=torch.int8)
    y = qlinear(x, qweight, torch.tensor([1e-3]))  # the unscaled sum is 1,040,384
    torch.testing.assert_close(y, torch.tensor([[1040.384]], dtype=torch.float16))


def test_nan_and_infinity_surface():
    x, qweight, scale, _, bias = layer(4, 6)
    x[0, 0], x[1, 0] = float("nan"), float("inf")
    qweight[:, 0] = 1
    y = qlinear(x, qweight, scale, bias=bias)
    assert y[0].isnan().all() and y[1].isinf().all() and y[2:].isfinite().all()


def test_autocast_leaves_the_dtype_of_x():
    args = layer(4, 6)
    expected = qlinear(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(qlinear(*args), expected)


def test_only_the_output_stays_allocated():
    x, qweight, scale, _, bias = layer(200, 300)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        y = qlinear(x, qweight, scale, bias=bias)
    events = {e.key: e for e in profile.key_averages()}
    kept = events["zo_kernels::qlinear"].cpu_memory_usage
    assert y.nbytes <= kept <= y.nbytes + 64 * 4  # the allocator rounds up


@pytest.mark.parametrize("zero_point", [False, True])
def test_gradients_of_x_and_bias(zero_point):
    x, qweight, scale, zero, bias = layer(4, 6, torch.float64, zero_point=zero_point)

    def f(x, bias):
        return qlinear(x, qweight, scale, zero, bias)

    assert torch.autograd.gradcheck(f, (x.requires_grad_(), bias.requires_grad_()))
    only_x = qlinear(x, qweight, scale, zero)
    assert torch.autograd.grad(only_x.sum(), x)[0].shape == x.shape


def test_gradient_of_scale_is_refused():
    x, qweight, scale, _, bias = layer(4, 6)
    with pytest.raises(NotImplementedError, match="qlinear: scale must not require a gradient"):
        qlinear(x, qweight, scale.requires_grad_(), bias=bias)
    with torch.no_grad():
        qlinear(x, qweight, scale, bias=bias)


def test_compiles_without_breaks_or_recompiles():
    compiled = torch.compile(qlinear, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        args = layer(4, 6, seed=seed)
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(*args), qlinear(*args))


BAD = {
    "x int": ({"x": torch.ones(5, 6, dtype=torch.int32)}, TypeError, r"x must be float32, "),
    "x scalar": ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[\.\.\., 6\]"),
    "x width": ({"x": torch.ones(5, 7)}, ValueError, r"x must be \[\.\.\., 6\] .* got .*\(5, 7\)"),
    "codes float": ({"qweight": torch.ones(4, 6)}, TypeError, r"qweight must be int8, got torch"),
    "codes 3d": (
        {"qweight": torch.ones(4, 6, 1, dtype=torch.int8)},
        ValueError,
        r"qweight must be \[N, K\], got shape \(4, 6, 1\)",
    ),
    "scale shape": ({"scale": torch.ones(5)}, ValueError, r"scale must be \[4\], one value per"),
    "scale column": ({"scale": torch.ones(4, 1)}, ValueError, r"scale must be \[4\], one"),
    "scale dtype": (
        {"scale": torch.ones(4, dtype=torch.bfloat16)},
        TypeError,
        r"scale must be float32, got torch.bfloat16",
    ),
    "zero dtype": ({"zero_point": torch.zeros(4)}, TypeError, r"zero_point must be int8, got"),
    "zero shape": (
        {"zero_point": torch.zeros(3, dtype=torch.int8)},
        ValueError,
        r"zero_point must be \[4\]",
    ),
    "bias shape": ({"bias": torch.ones(3)}, ValueError, r"bias must be \[4\], one value per"),
    "bias dtype": ({"bias": torch.ones(4).int()}, TypeError, r"bias must be float32 or bfloat16"),
    "device": (
        {"scale": torch.ones(4, device="meta")},
        ValueError,
        r"scale must be on the device of x \(cpu\), got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, kind, text = BAD[case]
    x, qweight, scale, _, bias = layer(4, 6)
    args = {"x": x, "qweight": qweight, "scale": scale, "bias": bias}
    with pytest.raises(kind, match=f"qlinear: {text}"):
        qlinear(**{**args, **change})
