# SPDX-License-Identifier: Apache-2.0
"""Gradients of the scales of qlinear and qconv2d, against autograd of the dequantized weight in
fp64; and what is allocated for them."""

import pytest
import torch
import torch.nn.functional as F
from quantized_twins import Weight
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zo_kernels.ops import qconv2d, qlinear, quantize_rows

ACTIVATION = {"none": lambda y: y, "silu": F.silu, "gelu": F.gelu}
# bits, scales of a row (of a tap), zero points
WEIGHTS = [(8, 1, False), (8, 2, True), (4, 1, True), (4, 4, False)]
GEOMETRY = {
    "3x3": ((40, 12, 3, 3), {"padding": 1}),
    "stride 2": ((40, 12, 3, 3), {"padding": 1, "stride": 2}),
    "odd": ((35, 4, 3, 2), {"padding": (1, 0), "dilation": (1, 2), "stride": (2, 1)}),
    "two groups": ((70, 4, 3, 3), {"padding": 1, "groups": 2}),
    "many groups": ((40, 4, 1, 3), {"groups": 10}),
}


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(a, act_bits, per_sample):
    """What is multiplied; the gradient passes straight through the rounding."""
    if act_bits == 16:
        return a
    codes, scale = quantize_rows(a.detach().float(), per_sample)
    near = codes.double() * scale.double().view(*scale.shape, *[1] * (a.dim() - scale.dim()))
    return a + (near - a).detach()


def real(weight, scale):
    """The weight in fp64, as a function of its scale."""
    n, *taps = weight.shape[0], *weight.shape[2:], weight.shape[1]
    rows = torch.from_numpy(weight.rows).double() * scale.view(n, weight.groups, 1)
    return rows.view(n, *taps).movedim(-1, 1)


def assert_gradients(op, exact, weight, x, channels, more, act_bits, dtype=torch.float32):
    """`exact` is the product in fp64: (inputs, weight) -> y."""
    given = {"x": x.to(dtype), "in_scale": randn(channels).abs() + 0.5, "scale": weight.scale}
    twins = {name: t.double().clone().requires_grad_() for name, t in given.items()}
    given = {name: t.clone().requires_grad_() for name, t in given.items()}
    y = op(**weight.arguments | given, **more, act_bits=act_bits)

    conv = x.dim() == 4
    along = twins["in_scale"].view(-1, 1, 1) if conv else twins["in_scale"]
    a = rounded(twins["x"] * along, act_bits, conv)
    y2 = ACTIVATION[more.get("activation", "none")](exact(a, real(weight, twins["scale"])))
    towards = randn(*y.shape, seed=2)
    wanted = torch.autograd.grad((y2 * towards).sum(), list(twins.values()))
    found = torch.autograd.grad((y.double() * towards).sum(), list(given.values()))
    for name, g, w in zip(given, found, wanted, strict=True):
        assert g.dtype == given[name].dtype and g.shape == given[name].shape
        error = (g.double() - w).norm() / w.norm()
        assert error < (4 if dtype == torch.bfloat16 else 10) * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,)], ids=str)
@pytest.mark.parametrize("act_bits", [16, 8])
@pytest.mark.parametrize(("bits", "groups", "zero"), WEIGHTS)
def test_linear(bits, groups, zero, act_bits, shape):
    weight = Weight((70, 24), bits, groups, zero)
    more = {"activation": "gelu" if bits == 4 else "none"}
    assert_gradients(qlinear, lambda a, w: a @ w.T, weight, randn(*shape), 24, more, act_bits)


@pytest.mark.parametrize("act_bits", [16, 8])
def test_linear_in_bf16(act_bits):
    weight, x = Weight((70, 24), 4, 2, True), randn(9, 24)
    assert_gradients(*(qlinear, lambda a, w: a @ w.T, weight, x, 24, {}, act_bits, torch.bfloat16))


@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize("act_bits", [16, 8])
@pytest.mark.parametrize(("bits", "parts", "zero"), WEIGHTS)
def test_conv(bits, parts, zero, act_bits, geometry):
    shape, where = GEOMETRY[geometry]
    taps = shape[2] * shape[3]
    weight = Weight(shape, bits, taps * parts if parts > 1 else 1, zero)
    channels = shape[1] * where.get("groups", 1)
    more = where | {"kernel_size": shape[2:], "activation": "silu"}

    def exact(a, w):
        return F.conv2d(a, w, **where)

    assert_gradients(qconv2d, exact, weight, randn(2, channels, 7, 8), channels, more, act_bits)


def test_in_fp64_the_gradients_are_exact():
    weight, x = Weight((37, 24), 8, 2, True), randn(5, 24).double()
    scale = weight.scale.clone().requires_grad_()
    y = qlinear(x, **weight.arguments | {"scale": scale})
    (found,) = torch.autograd.grad(y.square().sum(), scale)
    twin = weight.scale.double().clone().requires_grad_()
    (wanted,) = torch.autograd.grad((x @ real(weight, twin).T).square().sum(), twin)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=0)


def test_scales_of_int8_inputs():
    """Codes that another op made: in_scale went into them, the scale has its gradient."""
    weight, x = Weight((40, 12, 3, 3), 4), randn(2, 12, 5, 4)
    codes, x_scale = quantize_rows(x, per_sample=True)
    grads = []
    for inputs in ({"x": codes, "x_scale": x_scale}, {"x": x, "act_bits": 8}):
        scale = weight.scale.clone().requires_grad_()
        y = qconv2d(**weight.arguments | {"scale": scale, "kernel_size": 3}, **inputs)
        grads += torch.autograd.grad(y.square().sum(), scale)
    assert torch.equal(*grads)


class LargestFloat(TorchDispatchMode):
    """The most elements that a floating tensor had which any operation returned."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.most = max(self.most, leaf.numel())
        return result


@pytest.mark.parametrize("act_bits", [16, 8])
@pytest.mark.parametrize(("bits", "parts"), [(8, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("conv", [False, True])
def test_no_float_tensor_of_the_size_of_a_weight(conv, bits, parts, act_bits):
    """Forward and backward: none above half of it, where pictures and rows are small."""
    shape = (128, 64, 3, 3) if conv else (256, 512)
    weight = Weight(shape, bits, parts * (9 if conv and parts > 1 else 1), zero=bits == 4)
    channels = shape[1]
    x = randn(1, channels, 5, 5) if conv else randn(4, channels)
    leaves = [x, weight.scale.clone(), torch.ones(channels)]
    x, scale, in_scale = (t.requires_grad_() for t in leaves)
    more = {"in_scale": in_scale, "act_bits": act_bits, "activation": "silu"}
    more |= {"kernel_size": 3} if conv else {}
    arguments = weight.arguments | {"scale": scale}
    with LargestFloat() as watch:
        y = (qconv2d if conv else qlinear)(x, **arguments, **more)
        y.square().sum().backward()
    assert scale.grad is not None and in_scale.grad is not None and x.grad is not None
    assert 0 < watch.most <= weight.codes.numel() // 2
