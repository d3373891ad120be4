# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the quantized ops without a GPU: interpreted, or compiled ahead of time."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantized_twins import (
    FLOATS,
    Noise,
    Weight,
    assert_same_numbers,
    integer_twin,
    patches,
    quantize_twin,
    strided,
)

from zo_kernels.ops._quantized import Call
from zo_kernels.ops.qconv2d import Geometry
from zo_kernels.packing import packed_shape
from zo_kernels.rng import noise_numpy
from zo_kernels.testing import assert_close_to_math, assert_same_bits

pytest.importorskip("triton")
checks = pytest.importorskip("triton_checks")
from zo_kernels.kernels import _multiply, _numbers, _rows, quantize_rows  # noqa: E402
from zo_kernels.kernels.qconv2d import qconv2d_triton  # noqa: E402
from zo_kernels.kernels.qlinear import qlinear_triton  # noqa: E402

NAN, INF = float("nan"), float("inf")
COEFFS = {
    "scale": [1e-3, 0.37],
    "scale_relative": [1e-2, -1.3],
    "weight": [0.25, -1.37],
    "codes": [1.0, -3.0],
}


def interpreter(test):
    return checks.quiet(pytest.mark.interpreter(pytest.mark.usefixtures("rounded")(test)))


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def noise_of(perturb, kind="rademacher"):
    headroom = 3 if perturb == "codes" else 0
    return Noise(perturb, COEFFS[perturb], kind, draws=[3, -(2**40)], seed=-5, headroom=headroom)


def arguments(noise):
    """As the schema has them; none for no noise."""
    return {} if noise is None else noise.arguments | {"coeffs": torch.tensor(noise.coeffs)}


@interpreter
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows(dtype):
    cases = [randn(3, k, dtype=dtype) for k in (1, 63)] + [randn(2, 2, 127, dtype=dtype)]
    cases += [randn(1, _rows.LONGEST + 5, dtype=dtype), randn(7, 40, dtype=dtype).t()]
    cases += [strided(randn(3, 40, dtype=dtype)), torch.ones(0, 5, dtype=dtype)]
    for x in cases:
        by = randn(x.shape[-1]).abs()
        codes, scale = quantize_rows.quantize_rows_triton(x, False, by)
        wanted, wanted_scale = quantize_twin(x.reshape(-1, x.shape[-1]), by)
        assert_same_numbers(codes.view(wanted.shape), wanted, "triton")
        assert_same_numbers(scale.view(-1), wanted_scale, "triton")


@interpreter
def test_rows_that_have_no_scale():
    x = randn(5, 40)
    x[0], x[1] = 0, x[1] * 1e-38
    x[2, 3], x[3, 3], x[4] = NAN, -INF, x[4] * 1e38
    for per_sample, shape in ((False, (5, 40)), (True, (5, 2, 5, 4))):
        codes, scale = quantize_rows.quantize_rows_triton(x.view(shape), per_sample)
        wanted, wanted_scale = quantize_twin(x)
        assert_same_bits(codes.reshape(5, 40), wanted)
        assert_same_numbers(scale, wanted_scale, "triton")


@interpreter
def test_pictures(monkeypatch):
    monkeypatch.setattr(quantize_rows, "BLOCK", 64)  # several programs a picture
    by = randn(7).abs()
    for x in (randn(2, 7, 5, 4), randn(2, 7, 4, 5).transpose(2, 3), torch.ones(0, 7, 2, 2)):
        codes, scale = quantize_rows.quantize_rows_triton(x, True, by)
        wanted, wanted_scale = quantize_twin(x.permute(0, 2, 3, 1), by)
        assert codes.is_contiguous(memory_format=torch.channels_last)
        assert_same_bits(codes.permute(0, 2, 3, 1).contiguous(), wanted)
        assert_same_bits(scale, wanted_scale)


# N, K, bits, groups, zero points, perturbation
LINEAR = [
    (20, 63, 8, 1, True, None),
    (20, 96, 4, 3, True, None),
    (17, 1600, 4, 1, True, None),  # joined from parts
    (17, 40, 8, 1, False, ("scale", "normal")),
    (17, 64, 4, 2, False, ("scale_relative", "normal")),
    (17, 63, 8, 1, True, ("weight",)),
    (17, 64, 4, 2, True, ("weight",)),
    (17, 63, 4, 1, False, ("codes",)),
    (17, 128, 8, 1, False, ("codes",)),
]


@interpreter
@pytest.mark.parametrize(("n", "k", "bits", "groups", "zero", "what"), LINEAR)
def test_integers_of_linear_layers(n, k, bits, groups, zero, what):
    """The bits of the twin: bias, residual, int8 of x in the kernel, bf16 out."""
    weight = Weight((n, k), bits, groups, zero, headroom=3)
    noise, by = None if what is None else noise_of(*what), randn(k).abs()
    x, bias, residual = randn(4, 1, k), randn(n), randn(4, 1, n).bfloat16()
    rows, scale = quantize_twin(x.view(4, k), by)
    wanted = integer_twin(
        rows, scale, weight, bias, residual.view(4, n), noise=noise, out=torch.bfloat16
    )
    more = weight.arguments | arguments(noise) | {"bias": bias, "residual": residual}
    y = qlinear_triton(Call(x, **more, in_scale=by, act_bits=8, out_dtype=torch.bfloat16))
    assert_same_numbers(y.view(4, n), wanted, "triton")


@interpreter
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("what", [None, ("weight",), ("codes",), ("scale", "rademacher")], ids=str)
def test_floats_of_linear_layers(what, dtype):
    """As exact as torch: 4 bits in groups of 32 with zero points, 8 bits joined from parts."""
    for bits, k, groups, zero in ((4, 64, 2, what != ("codes",)), (8, 600, 1, True)):
        if what is not None and k == 600:
            continue
        weight, noise = Weight((20, k), bits, groups, zero), what and noise_of(*what)
        x, bias, by = randn(4, k, dtype=dtype), randn(20, dtype=dtype), randn(k).abs() + 0.1
        reals = [weight.real(noise, p) for p in range(2)] if what else [weight.real()]
        for in_scale in (None, by) if bits == 4 and what is None else (None,):
            scaled = x if in_scale is None else x.float() * in_scale
            parts = scaled.chunk(len(reals))
            exact = [
                F.linear(a.double(), w, bias.double()) for a, w in zip(parts, reals, strict=True)
            ]
            theirs = [
                F.linear(a.to(dtype), w.to(dtype), bias) for a, w in zip(parts, reals, strict=True)
            ]
            more = weight.arguments | arguments(noise) | {"bias": bias, "in_scale": in_scale}
            y = qlinear_triton(Call(x, **more))
            assert_close_to_math(y, torch.cat(theirs), torch.cat(exact))


# channels, N, kernel, stride, padding, dilation, bits, groups, perturbation
CONV = [
    (5, 6, (1, 1), (2, 1), (0, 0), (1, 1), 8, 1, None),
    (5, 6, (3, 3), (1, 2), (1, 2), (2, 1), 4, 1, None),
    (32, 6, (2, 1), (1, 1), (1, 0), (1, 1), 4, 2, ("weight",)),
    (9, 6, (1, 3), (2, 2), (1, 1), (1, 1), 8, 1, ("codes",)),
]


@interpreter
@pytest.mark.parametrize(
    ("channels", "n", "kernel", "stride", "padding", "dilation", "bits", "groups", "what"), CONV
)
def test_convolutions(channels, n, kernel, stride, padding, dilation, bits, groups, what):
    """Integers to the bit, and bf16 as exact as torch."""
    weight = Weight((n, channels, *kernel), bits, groups, zero=what is None, headroom=3)
    noise, x = None if what is None else noise_of(*what), randn(2, channels, 4, 5)
    geometry = Geometry(kernel, stride, padding, dilation)
    where = dict(zip(("stride", "padding", "dilation"), (stride, padding, dilation), strict=True))
    codes, scale = quantize_twin(x)
    rows = patches(codes, kernel, **where)
    size = rows.shape[1:3]
    residual, bias = randn(2, n, *size), randn(n)
    flat = residual.permute(0, 2, 3, 1).reshape(-1, n)
    per_row = scale.repeat_interleave(size[0] * size[1])
    wanted = integer_twin(rows.flatten(0, 2), per_row, weight, bias, flat, noise=noise)
    call = Call(x, **weight.arguments, **arguments(noise), bias=bias, act_bits=8)
    y = qconv2d_triton(call._replace(residual=residual), geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same_numbers(y.permute(0, 2, 3, 1).reshape(-1, n), wanted, "triton")

    x, bias = x.bfloat16(), bias.bfloat16()
    y = qconv2d_triton(call._replace(x=x, bias=bias, act_bits=16), geometry)
    real = torch.stack([weight.real(noise, p) for p in range(2)])
    exact = [F.conv2d(x[p : p + 1].double(), real[p], bias.double(), **where) for p in range(2)]
    real = real.bfloat16()
    theirs = [F.conv2d(x[p : p + 1], real[p], bias, **where) for p in range(2)]
    assert_close_to_math(y, torch.cat(theirs), torch.cat(exact))


@interpreter
@pytest.mark.parametrize("perturb", ["scale", "scale_relative"])
def test_scales_perturbed_by_hand(perturb):
    """The same bits as a call with scales that were changed in a tensor; of floats too, whose sums
    are joined from parts."""
    for act_bits, k in ((8, 40), (16, 600)):
        weight, noise, x = Weight((17, k), 8), noise_of(perturb, "normal"), randn(2, k)
        plain = Call(x, **weight.arguments, act_bits=act_bits)
        together = qlinear_triton(plain._replace(**arguments(noise)))
        for p in range(2):
            change = torch.tensor(noise.coeffs[p]) * torch.from_numpy(noise.z(p, (17,)))
            by = weight.scale + change if perturb == "scale" else weight.scale * (1 + change)
            alone = qlinear_triton(plain._replace(x=x[p : p + 1], scale=by))
            assert_same_bits(together[p : p + 1], alone)


@interpreter
@pytest.mark.parametrize("what", COEFFS)
def test_numbers_of_the_device(what):
    """Draws and coefficients are read where they were placed: what has frozen all else perturbs
    anew. With k joined from parts, too."""
    weight, k = Weight((17, 600), 8, headroom=3), 600
    first, second = noise_of(what), noise_of(what)
    second.draws, second.coeffs = [-7, 2**33], [second.coeffs[1], second.coeffs[0]]
    call = Call(randn(4, k), **weight.arguments, **arguments(first), act_bits=8)
    wanted = qlinear_triton(call._replace(**arguments(second)))
    there = torch.tensor(second.draws), torch.tensor(second.coeffs)
    with _numbers.placed(torch.zeros(2), there), _numbers.placed(call.coeffs, there):
        assert_same_bits(qlinear_triton(call), wanted)
    assert not torch.equal(qlinear_triton(call), wanted)


@interpreter
def test_the_noise_is_that_of_the_contract():
    """Unit inputs read the perturbed weight: over several words of signs, from odd elements on."""
    for k in (45, 128):
        weight = Weight((9, k), 8)
        more = weight.arguments | {"scale": torch.ones(9)}
        noise = {"perturb": "weight", "seed": 7, "stream": 2**32 - 1, "draws": [8]}
        y = qlinear_triton(Call(torch.eye(k), **more, **noise, coeffs=torch.ones(1)))
        where = {"seed": 7, "draw": 8, "stream": 2**32 - 1, "kind": "rademacher"}
        signs = torch.from_numpy(noise_numpy(9 * k, **where)).view(9, k)
        assert torch.equal(y.T, weight.codes + signs)


@interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_and_what_is_not_finite(activation):
    weight, x, by = Weight((20, 40), 8), randn(5, 40) * 30, {"silu": F.silu, "gelu": F.gelu}
    plain = qlinear_triton(Call(x, **weight.arguments))
    y = qlinear_triton(Call(x, **weight.arguments, activation=activation))
    activate = by[activation]
    assert_close_to_math(y, activate(plain), activate(plain.double()))
    for bad in (NAN, INF):
        x[1, 7] = bad
        for act_bits in (8, 16):
            y = qlinear_triton(Call(x, **weight.arguments, act_bits=act_bits))
            others = torch.arange(5) != 1
            assert not y[1].isfinite().any() and y[others].isfinite().all()
    y = qlinear_triton(
        Call(torch.full((1, 40), INF), weight.arguments["qweight"], weight.scale * 0)
    )
    assert y.isnan().all()


@interpreter
def test_empty_and_misaligned():
    weight = Weight((20, 40), 8)
    assert qlinear_triton(Call(torch.ones(0, 40), **weight.arguments)).shape == (0, 20)
    more = weight.arguments
    whole = torch.cat([torch.zeros(3, dtype=torch.uint8), more["qweight"].flatten()])
    odd = more | {"qweight": whole[3:].view(more["qweight"].shape)}
    x = randn(3, 40)
    assert_same_bits(qlinear_triton(Call(x, **odd)), qlinear_triton(Call(x, **more)))


@pytest.mark.slow
def test_interpreter():
    """Runs the tests above, in a process whose Triton interprets."""
    assert checks.interpreted(__file__) == 40


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def layer(m, n, k, bits=8, groups=1, zero=False, *, dtype=torch.bfloat16, **more):
    """A call of `qlinear`; k may be (C, kh, kw) for one of `qconv2d` on 16 x 16 pixels."""
    taps, channels = (1, k) if isinstance(k, int) else (k[1] * k[2], k[0])
    scale = (n, groups) if groups > 1 else (n,)
    x = meta(m, k, dtype=dtype) if taps == 1 else meta(m // 256, channels, 16, 16, dtype=dtype)
    qweight = meta(*packed_shape((n, channels, 1, taps), bits), dtype=torch.uint8)
    zero_point = meta(*scale, dtype=torch.int8) if zero else None
    call = Call(x, qweight, meta(*scale), zero_point, meta(n, dtype=dtype), bits)
    if "perturb" in more:
        more |= {"draws": [1, 2], "coeffs": torch.tensor([1.0, -1.0]), "headroom": 3}
    return call._replace(**more)


# Layers of Stable Diffusion, and small batches; and what they are compiled for.
COMPILED = [
    ("sm_80 sm_90 gfx942", layer(4096, 1280, 1280, act_bits=8)),
    ("sm_90 gfx942", layer(4096, 640, (640, 3, 3), 4, act_bits=8, perturb="codes")),
    ("sm_80", layer(4096, 1280, 1280, 4, 20, act_bits=8, perturb="scale", kind="normal")),
    ("sm_90", layer(2, 77, 63, dtype=torch.float32, perturb="weight", activation="gelu")),
    ("sm_90", layer(1, 4096, 4096, 4, act_bits=8)),
    ("gfx942", layer(1, 4096, 4096, 4, 64, True)),
]
CASES = [
    (architecture, i)
    for i, (architectures, _) in enumerate(COMPILED)
    for architecture in architectures.split()
    if architecture in checks.TARGETS
]
PRODUCT = {  # what multiplies int8, and bf16
    "sm_80": (r"mma\.sync.*s32\.s8\.s8\.s32", r"mma\.sync.*f32\.bf16\.bf16\.f32"),
    "sm_90": (r"wgmma\..*s32\.s8\.s8|mma\.sync.*s32\.s8\.s8", r"mma.*f32\.bf16\.bf16"),
    "gfx942": (r"v_mfma_i32_\w+_i8", r"v_mfma_f32_\w+_bf16"),
}


@pytest.mark.parametrize(("architecture", "case"), CASES)
def test_ahead_of_time(architecture, case, monkeypatch, tmp_path):
    """Compiles for a GPU that need not be here, as it would be launched: on tensor cores, within
    the memory of a multiprocessor, without spilled registers, integers without fma."""
    call = COMPILED[case][1]
    with checks.compiling(architecture, monkeypatch, tmp_path) as kernels:
        if call.x.dim() == 4:
            qconv2d_triton(call, Geometry((3, 3), padding=(1, 1)))
        else:
            qlinear_triton(call)
    by_name = {kernel.metadata.name: kernel for kernel in kernels}
    assert ("_join_kernel" in by_name) == (len(call.x) == 1)
    amd = architecture.startswith("gfx")
    for name, kernel in by_name.items():
        checks.check_resources(kernel, architecture, tmp_path)
        text = kernel.asm["amdgcn" if amd else "ptx"]
        if name == "_product_kernel":
            assert re.search(PRODUCT[architecture][not call.is_integer], text)
            if len(call.x) == 1 and not amd:  # few rows: what a loop loads comes by 16 bytes
                sizes = re.findall(r"cp\.async\.c\w\.shared\.global .*?, .*?, (\w+)", text)
                assert set(sizes) == {"0x10"}
        divides = name in ("_rows_kernel", "_quantize_pictures_codes_kernel")  # by fma on AMD
        if call.is_integer and not (amd and divides):
            assert not re.search(r"\bfma\.rn\.f32|v_fma_f32|v_fmac_f32|v_mad_f32", text)


@pytest.mark.parametrize("k", [1, 63])
def test_sizes_of_one_compile(k, monkeypatch, tmp_path):
    """Triton makes constants of sizes that are 1."""
    with checks.compiling("sm_90", monkeypatch, tmp_path) as kernels:
        qlinear_triton(layer(1, 1, k, 4))
    assert len(kernels) == 1


def test_what_changes_with_a_step_is_no_new_kernel():
    for kernel in (_multiply._product_kernel, _multiply._join_kernel):
        for p in kernel.params:
            if p.name in ("seed", "stream", "rows"):
                assert p.do_not_specialize and not p.is_constexpr


def test_the_operand_of_floats():
    """fp16 keeps fp16 unless it was scaled: only fp32 holds that."""

    def operand(dtype, in_scale=None, out=None):
        call = SimpleNamespace(
            x=meta(1, 1, dtype=dtype), in_scale=in_scale, result_dtype=out or dtype
        )
        kind, parts = _multiply.operand(call)
        return str(kind), parts

    fp16, bf16, fp32, by = torch.float16, torch.bfloat16, torch.float32, meta(1)
    assert operand(bf16) == operand(bf16, by) == operand(bf16, None, fp32) == ("bf16", 1)
    assert operand(fp16) == ("fp16", 1)
    assert operand(fp32) == operand(fp16, by) == operand(bf16, by, fp32) == ("bf16", 3)


def test_bf16_holds_every_code():
    codes = np.arange(-255, 256)
    kept = torch.from_numpy(codes).bfloat16().float()
    assert torch.equal(kept, torch.from_numpy(codes).float())
    assert torch.equal((kept * 16).half().float(), kept * 16)  # in sixteenths of a code
