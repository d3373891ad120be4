# SPDX-License-Identifier: Apache-2.0
"""Several perturbations of a quantized weight in one pass, of qlinear and of qconv2d alike."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantized_twins import (
    BACKENDS,
    FLOATS,
    Noise,
    Weight,
    assert_same_numbers,
    everywhere,
    integer_twin,
    patches,
    quantize_twin,
)

from zo_kernels.ops import qconv2d, qlinear
from zo_kernels.packing import pack
from zo_kernels.rng import noise_numpy
from zo_kernels.testing import SIZES, assert_close_to_math, assert_same_bits

COEFFS = {
    "scale": [1e-3, -1e-3, 0.0, 0.37],
    "scale_relative": [1e-2, -1e-2, 0.0, 1.3],
    "weight": [0.25, -0.25, 0.0, 1.37],
    "codes": [1.0, -1.0, 0.0, 3.0],
}
MODES = [("scale", "normal"), ("scale", "rademacher"), ("scale_relative", "normal")]
MODES += [("scale_relative", "rademacher"), ("weight", "rademacher"), ("codes", "rademacher")]
# bits, groups, zero points
KINDS = [(8, 1, False), (8, 3, True), (4, 1, True), (4, 3, False)]


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def noise_of(perturb, kind="rademacher", **more):
    return Noise(perturb, COEFFS[perturb], kind, headroom=3 if perturb == "codes" else 0, **more)


def weight_of(shape, perturb, bits, groups=1, zero=False):
    return Weight(shape, bits, groups, zero and perturb != "codes", headroom=3)


def linear(x, weight, noise, bias=None):
    """Operands of qlinear, the twin's result and the exact one."""
    codes, scale = quantize_twin(x.view(-1, x.shape[-1]))
    integers = integer_twin(codes, scale, weight, bias, noise=noise, out=x.dtype)
    rows, exact, by_torch = x.chunk(4), [], []
    for p in range(4):
        real = weight.real(noise, p)
        exact.append(F.linear(rows[p].double(), real, None if bias is None else bias.double()))
        own = None if bias is None else bias.to(x.dtype)
        by_torch.append(F.linear(rows[p], real.to(x.dtype), own))
    more = weight.arguments | noise.arguments | {"bias": bias}
    return more, integers.view(*x.shape[:-1], -1), torch.cat(exact), torch.cat(by_torch)


def conv(x, weight, noise, bias=None):
    """The same of qconv2d."""
    kernel, where = weight.shape[2:], {"padding": 1, "stride": 2}
    codes, scale = quantize_twin(x)
    rows = patches(codes, kernel, **where)
    batch, height, width, k = rows.shape
    per_row = scale.repeat_interleave(height * width)
    integers = integer_twin(rows.view(-1, k), per_row, weight, bias, noise=noise, out=x.dtype)
    integers = integers.view(batch, height, width, -1).permute(0, 3, 1, 2)
    exact, by_torch = [], []
    for p, pictures in enumerate(x.chunk(4)):
        real = weight.real(noise, p)
        wide = None if bias is None else bias.double()
        exact.append(F.conv2d(pictures.double(), real, wide, **where))
        own = None if bias is None else bias.to(x.dtype)
        by_torch.append(F.conv2d(pictures, real.to(x.dtype), own, **where))
    more = weight.arguments | noise.arguments | {"bias": bias, "kernel_size": kernel} | where
    return more, integers, torch.cat(exact), torch.cat(by_torch)


def check(op, operands, x):
    """The names of the backends that were checked in both ways."""
    (more, integers, exact, by_torch), names = operands, []
    for backend, y in everywhere(op, x, **more, act_bits=8):
        assert_same_numbers(y, integers, backend)
        names.append(backend)
    for backend, y in everywhere(op, x, **more):
        assert_close_to_math(y, by_torch, exact)
        names.append(backend)
    return names


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("bits", "groups", "zero"), KINDS)
@pytest.mark.parametrize(("perturb", "kind"), MODES)
def test_linear(perturb, kind, bits, groups, zero, dtype):
    weight, noise = weight_of((33, 192), perturb, bits, groups, zero), noise_of(perturb, kind)
    x = randn(8, 2, 192, dtype=dtype)
    check(qlinear, linear(x, weight, noise, randn(33)), x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("bits", "groups", "zero"), KINDS)
@pytest.mark.parametrize(("perturb", "kind"), MODES)
def test_conv(perturb, kind, bits, groups, zero, dtype):
    groups = 1 if groups == 1 else 18
    weight = weight_of((19, 12, 3, 3), perturb, bits, groups, zero)
    x, noise = randn(8, 12, 5, 6, dtype=dtype), noise_of(perturb, kind)
    check(qconv2d, conv(x, weight, noise, randn(19)), x)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("axis", ["m", "n", "k"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("perturb", COEFFS)
def test_sizes(perturb, bits, axis, size):
    shape = {"m": 2, "n": 7, "k": 63} | {axis: size}
    weight = weight_of((shape["n"], shape["k"]), perturb, bits)
    x, noise = randn(4 * shape["m"], shape["k"]), noise_of(perturb)
    check(qlinear, linear(x, weight, noise), x)


@pytest.mark.parametrize("c", [1, 7, 64, 130])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("perturb", ["weight", "codes"])
def test_channels(perturb, bits, c):
    """The noise of a convolution is counted over [N, kh, kw, C], without the places that pad C."""
    weight, noise = weight_of((9, c, 3, 3), perturb, bits), noise_of(perturb)
    x = randn(4, c, 5, 4)
    check(qconv2d, conv(x, weight, noise), x)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("perturb", COEFFS)
def test_several_panels_and_blocks(perturb, bits):
    weight, noise = weight_of((144, 640), perturb, bits, 5), noise_of(perturb)
    x = randn(4 * 33, 640)
    assert check(qlinear, linear(x, weight, noise), x) == 2 * BACKENDS
    weight = weight_of((80, 320, 3, 3), perturb, bits, 9)
    x = randn(4, 320, 8, 8)
    assert check(qconv2d, conv(x, weight, noise), x) == 2 * BACKENDS


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("perturb", "kind"), MODES)
def test_one_pass_equals_four(perturb, kind, bits, act_bits):
    noise = noise_of(perturb, kind)
    for op, shape, size, more in (
        (qlinear, (40, 96), (12, 5, 96), {}),
        (qconv2d, (24, 16, 3, 3), (8, 16, 6, 5), {"kernel_size": 3, "padding": 1}),
    ):
        weight, x = weight_of(shape, perturb, bits, zero=True), randn(*size)
        more = more | weight.arguments | {"act_bits": act_bits, "bias": randn(shape[0])}
        passes = [everywhere(op, x.chunk(4)[p], **more, **noise.one(p)) for p in range(4)]
        for (_, together), *alone in zip(
            everywhere(op, x, **more, **noise.arguments), *passes, strict=True
        ):
            assert_same_bits(together, torch.cat([y for _, y in alone]))


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("perturb", COEFFS)
def test_no_coefficient_is_no_perturbation(perturb, act_bits):
    weight, x = weight_of((40, 96), perturb, 8), randn(8, 96)
    more = weight.arguments | {"act_bits": act_bits}
    noise = noise_of(perturb).arguments | {"coeffs": [0.0] * 4}
    for (backend, y), (_, plain) in zip(
        everywhere(qlinear, x, **more, **noise), everywhere(qlinear, x, **more), strict=True
    ):
        if act_bits == 8:
            assert_same_numbers(y, plain, backend)
        torch.testing.assert_close(y, plain)


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("perturb", ["scale", "scale_relative"])
def test_scales_perturbed_by_hand(perturb, groups, kind):
    """The same bits as a call with scales that were changed in a tensor."""
    weight, x, noise = Weight((33, 192), 4, groups), randn(8, 192), noise_of(perturb, kind)
    scales = []
    for draw, c in zip(noise.draws, noise.coeffs, strict=True):
        where = {"seed": noise.seed, "draw": draw, "stream": noise.stream, "kind": kind}
        z = torch.from_numpy(noise_numpy(33 * groups, **where)).view(weight.scale.shape)
        change = torch.tensor(c) * z
        by_hand = weight.scale + change if perturb == "scale" else weight.scale * (1 + change)
        scales.append(by_hand)
    given = weight.arguments
    for act_bits in (8, 16):
        passes = [
            everywhere(qlinear, rows, **given | {"scale": scale}, act_bits=act_bits)
            for rows, scale in zip(x.chunk(4), scales, strict=True)
        ]
        together = everywhere(qlinear, x, **given, **noise.arguments, act_bits=act_bits)
        for (_, y), *alone in zip(together, *passes, strict=True):
            assert_same_bits(y, torch.cat([one for _, one in alone]))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("groups", [1, 9])
def test_codes_perturbed_by_hand(groups, bits):
    """The same bits as a call with the moved codes: 8-bit ones, since a step is 1/16 code or 1."""
    weight, x, noise = weight_of((10, 12, 3, 3), "codes", bits, groups), randn(4, 12, 5, 4), None
    noise, unit = noise_of("codes"), 16 if bits == 4 else 1
    where = {"kernel_size": 3, "padding": 1, "act_bits": 8}
    passes = []
    for p in range(4):
        signs = torch.from_numpy(noise.signs(p, (10, 3, 3, 12))).permute(0, 3, 1, 2)
        moved = unit * weight.codes.long() + int(noise.coeffs[p]) * signs
        packed = pack(moved.to(torch.int8))
        assert torch.equal(moved, moved.to(torch.int8).long())
        by_hand = everywhere(qconv2d, x[p : p + 1], packed, weight.scale / unit, **where)
        passes.append(by_hand)
    together = everywhere(qconv2d, x, **weight.arguments, **noise.arguments, **where)
    for (_, y), *alone in zip(together, *passes, strict=True):
        assert_same_bits(y, torch.cat([one for _, one in alone]))


def test_whole_steps_of_weight_and_codes_agree():
    """8 bits: below 2^24 the two ways round to the same number."""
    weight, x = weight_of((40, 96), "codes", 8), randn(8, 96)
    codes, moved = noise_of("codes"), Noise("weight", COEFFS["codes"])
    for (backend, a), (_, b) in zip(
        everywhere(qlinear, x, **weight.arguments, **codes.arguments, act_bits=8),
        everywhere(qlinear, x, **weight.arguments, **moved.arguments, act_bits=8),
        strict=True,
    ):
        assert_same_numbers(a, b, backend)


def test_the_noise_is_that_of_the_contract():
    """Unit inputs read the perturbed weight itself."""
    weight, noise = weight_of((5, 7, 2, 3), "weight", 8), noise_of("weight", draws=[8])
    noise.coeffs = [1.0]
    x = (
        torch.eye(7 * 6).view(42, 6, 7).permute(0, 2, 1).reshape(42, 7, 2, 3)
    )  # k-th is tap, channel
    more = weight.arguments | noise.arguments | {"kernel_size": (2, 3)}
    more["scale"] = torch.ones(5)
    where = {"seed": noise.seed, "draw": 8, "stream": noise.stream, "kind": "rademacher"}
    signs = torch.from_numpy(noise_numpy(5 * 42, **where)).view(5, 42)
    codes = weight.codes.permute(0, 2, 3, 1).reshape(5, 42)
    for act_bits in (8, 16):
        for _, y in everywhere(qconv2d, x, **more, act_bits=act_bits):
            torch.testing.assert_close(y.view(42, 5).T, codes + signs, rtol=1e-6, atol=1e-5)


def test_changes_of_seed_stream_and_draw_count():
    weight, x = weight_of((5, 6), "weight", 8), randn(1, 6)
    changes = [{}, {"seed": 1}, {"seed": 2**32}, {"stream": 1}, {"draws": [1]}, {"draws": [2**32]}]
    base = {"perturb": "weight", "draws": [0], "coeffs": [0.5], "act_bits": 8}
    results = [
        dict(everywhere(qlinear, x, **weight.arguments, **base | change)) for change in changes
    ]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert all(not torch.equal(one[backend], other[backend]) for backend in one)
    wrapped = everywhere(qlinear, x, **weight.arguments, **base | {"seed": 2**64 - 1})
    signed = everywhere(qlinear, x, **weight.arguments, **base | {"seed": -1})
    for (_, a), (_, b) in zip(wrapped, signed, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("act_bits", [8, 16])
def test_with_everything_else(act_bits):
    """Activation, residual, input scale, bf16 output; int8 inputs with their scales."""
    weight, x = weight_of((20, 48), "weight", 4, 3, True), randn(4, 3, 48)
    more = weight.arguments | noise_of("weight").arguments | {"bias": randn(20)}
    more |= {"in_scale": randn(48).abs(), "act_bits": act_bits}
    residual = randn(4, 3, 20).bfloat16()
    for (backend, plain), (_, y) in zip(
        everywhere(qlinear, x, **more),
        everywhere(
            qlinear,
            x,
            **more,
            activation="silu",
            residual=residual,
            out_dtype=torch.bfloat16,
        ),
        strict=True,
    ):
        expected = (F.silu(plain) + residual.float()).bfloat16()
        torch.testing.assert_close(y, expected, rtol=0.01, atol=1e-5, msg=backend)


def test_integers_that_are_given():
    weight, noise = weight_of((20, 48), "weight", 4), noise_of("weight")
    codes, scale = quantize_twin(randn(8, 48))
    expected = integer_twin(codes, scale, weight, noise=noise)
    more = weight.arguments | noise.arguments
    for backend, y in everywhere(qlinear, codes, **more, x_scale=scale):
        assert_same_numbers(y, expected, backend)


def test_what_is_not_finite_stays_with_its_samples():
    weight, noise, x = weight_of((20, 48), "weight", 8), noise_of("weight"), randn(8, 48)
    bad = x.clone()
    bad[3, 5] = float("nan")
    more = weight.arguments | noise.arguments
    for act_bits in (8, 16):
        for (backend, y), (_, usual) in zip(
            everywhere(qlinear, bad, **more, act_bits=act_bits),
            everywhere(qlinear, x, **more, act_bits=act_bits),
            strict=True,
        ):
            assert y[3].isnan().all(), backend
            others = torch.arange(8) != 3
            assert_same_bits(y[others], usual[others])


@pytest.mark.parametrize("act_bits", [8, 16])
def test_empty_batch(act_bits):
    more = {"act_bits": act_bits} | noise_of("codes").arguments
    weight = weight_of((20, 6), "codes", 8)
    for _, y in everywhere(qlinear, torch.ones(0, 6), **weight.arguments, **more):
        assert y.shape == (0, 20)
    weight = weight_of((20, 6, 3, 3), "codes", 4)
    more |= {"kernel_size": 3} | weight.arguments
    for _, y in everywhere(qconv2d, torch.ones(0, 6, 5, 4), **more):
        assert y.shape == (0, 20, 3, 2)


def test_the_mean_over_draws_is_the_unperturbed_result():
    weight, x = weight_of((6, 16), "weight", 8), randn(1, 16)
    n = 1500
    more = {"perturb": "weight", "draws": range(n), "coeffs": [2.0] * n}
    y = qlinear(x.expand(n, 16), **weight.arguments, **more).double()
    deviation = 2 * weight.scale.double() * x.double().norm() / n**0.5
    error = (y.mean(0) - x.double() @ weight.real().T).abs()
    assert (error < 4.5 * deviation).all()
    assert np.allclose(y.std(0), deviation * n**0.5, rtol=0.1)


@pytest.mark.parametrize("perturb", COEFFS)
def test_compiles_once_for_all_seeds_draws_and_coefficients(perturb):
    compiled = torch.compile(qlinear, fullgraph=True, backend="aot_eager")
    weight, x = weight_of((20, 48), perturb, 8), randn(4, 48)
    for i in range(4):
        noise = {"perturb": perturb, "draws": [7 + i, 2**40 + i], "seed": 11 * i + 5, "stream": 3}
        noise |= {"coeffs": torch.tensor([1.0 + i % 2, -1.0]), "headroom": 3}
        more = weight.arguments | noise | {"act_bits": 8}
        # The first change makes the numbers symbols.
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            assert_same_bits(compiled(x, **more), qlinear(x, **more))


def test_kernels_test_the_steps_that_the_wrapper_could_not_read():
    """As under torch.compile: straight to the op."""
    weight = Weight((4, 6), headroom=2)
    operands = (torch.ones(4, 6), weight.arguments["qweight"], weight.scale, None, None, 8, 8)
    noise = ("codes", "rademacher", 0, 0, [0], torch.tensor([3.0]), 2)
    for overload in (torch.ops.zo_kernels.qlinear.default, torch.ops.zo_kernels.qlinear.reference):
        with pytest.raises((ValueError, RuntimeError), match="qlinear: coeffs must be whole"):
            overload(*operands, None, None, "none", None, *noise)
