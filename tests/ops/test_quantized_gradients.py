# SPDX-License-Identifier: Apache-2.0
"""Gradients of qlinear and qconv2d: of x, scale, in_scale, bias and residual."""

import pytest
import torch
import torch.nn.functional as F
from quantized_twins import FLOATS, Weight

from zo_kernels.ops import qconv2d, qlinear, quantize_rows

# bits, groups or scales for a tap, zero points
LINEAR = [(8, 1, False), (8, 3, True), (4, 1, True), (4, 3, False)]
CONV = [(8, 1, False), (8, 2, True), (4, 1, True), (4, 4, False)]


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("bits", "groups", "zero"), LINEAR)
@pytest.mark.parametrize("activation", ["none", "silu", "gelu"])
def test_linear(activation, bits, groups, zero):
    weight = Weight((4, 6), bits, groups, zero)
    x, bias, residual = (randn(*s, dtype=torch.float64) for s in ((2, 5, 6), (4,), (2, 5, 4)))
    more = weight.arguments | {"activation": activation, "in_scale": randn(6).abs()}

    def f(x, bias, residual):
        return qlinear(x, bias=bias, residual=residual, **more)

    leaves = [t.requires_grad_() for t in (x, bias, residual)]
    assert torch.autograd.gradcheck(f, leaves)
    only_x = qlinear(x, **more)
    assert torch.autograd.grad(only_x.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_linear_pass_straight_through_the_rounding(activation, dtype):
    """As if the rounded activations had been given, in the dtype of each input."""
    weight, x = Weight((8, 6), 4, 3), randn(5, 6, dtype=dtype).requires_grad_()
    bias, residual = randn(8).requires_grad_(), randn(5, 8).bfloat16().requires_grad_()
    more = {"bias": bias, "residual": residual, "activation": activation}
    y = qlinear(x, **weight.arguments, **more, act_bits=8)
    grads = torch.autograd.grad((y.float() * randn(5, 8)).sum(), (x, bias, residual))
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.bfloat16]

    codes, scale = quantize_rows(x)
    rounded = (codes.double() * scale.double()[:, None]).requires_grad_()
    exact = rounded @ weight.real().T + bias.detach().double()
    exact = {"none": lambda y: y, "silu": F.silu}[activation](exact)
    (wanted,) = torch.autograd.grad((exact * randn(5, 8)).sum(), rounded)
    error = (grads[0].double() - wanted).abs().max() / wanted.abs().max()
    assert error < 6 * torch.finfo(dtype).eps + 1e-6


def test_linear_that_are_refused():
    weight, x = Weight((4, 6)), randn(4, 6).requires_grad_()
    args = weight.arguments | {"x_scale": torch.ones(4, requires_grad=True)}
    with pytest.raises(NotImplementedError, match="qlinear: x_scale must not require a gradient"):
        qlinear(torch.ones(4, 6, dtype=torch.int8), **args)
    args = weight.arguments | {"perturb": "scale", "draws": [0], "coeffs": [0.1]}
    with pytest.raises(NotImplementedError, match="qlinear: perturb must be 'none' where a grad"):
        qlinear(x, **args)
    with torch.no_grad():
        qlinear(x, **args)


@pytest.mark.parametrize(("bits", "parts", "zero"), CONV)
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv(groups, activation, bits, parts, zero):
    weight = Weight((4, 4, 3, 2), bits, 6 * parts if parts > 1 else 1, zero)
    shapes = ((2, 4 * groups, 6, 5), (4,), (2, 4, 3, 4))
    x, bias, residual = (randn(*s, dtype=torch.float64).requires_grad_() for s in shapes)
    where = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "groups": groups}
    more = weight.arguments | {"activation": activation, "in_scale": randn(4 * groups)} | where

    def f(x, bias, residual):
        return qconv2d(x, bias=bias, residual=residual, **more)

    assert torch.autograd.gradcheck(f, (x, bias, residual), fast_mode=True)


def test_conv_pass_straight_through_the_rounding():
    weight, x = Weight((8, 6, 3, 3), 4, 9), randn(2, 6, 5, 4).requires_grad_()
    bias = randn(8).requires_grad_()
    more = {"bias": bias, "activation": "gelu", "kernel_size": 3, "padding": 1, "act_bits": 8}
    y = qconv2d(x, **weight.arguments, **more)
    grads = torch.autograd.grad((y * randn(2, 8, 5, 4)).sum(), (x, bias))

    codes, scale = quantize_rows(x, per_sample=True)
    rounded = (codes.double() * scale.double().view(-1, 1, 1, 1)).requires_grad_()
    exact = F.gelu(F.conv2d(rounded, weight.real(), bias.double(), padding=1))
    wanted = torch.autograd.grad((exact * randn(2, 8, 5, 4)).sum(), (rounded, bias))
    for grad, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.double(), exact.double(), rtol=1e-4, atol=1e-5)


def test_conv_that_are_refused():
    weight, x = Weight((8, 6, 3, 3)), randn(2, 6, 5, 4).requires_grad_()
    args = weight.arguments | {"kernel_size": 3}
    args |= {"scale": weight.scale.detach(), "perturb": "weight", "draws": [0], "coeffs": [0.1]}
    with pytest.raises(NotImplementedError, match="qconv2d: perturb must be 'none' where a grad"):
        qconv2d(x, **args)
