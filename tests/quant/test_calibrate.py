# SPDX-License-Identifier: Apache-2.0
"""Rounding that is learned from data: better on the data, within a step of nearest rounding."""

import copy

import pytest
import torch
from torch import nn

from zo_kernels.nn import QuantModule
from zo_kernels.quant import (
    QuantConfig,
    Reconstruction,
    load_quantized,
    quantize_,
    reconstruct_,
    save_quantized,
)

QUICK = Reconstruction(steps=60, lr=5e-2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv1 = nn.GroupNorm(2, 32), nn.Conv2d(32, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 1)

    def forward(self, x, scale=1.0):
        return x + scale * self.conv2(torch.nn.functional.silu(self.conv1(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inlet, self.blocks = nn.Conv2d(4, 32, 3), nn.ModuleList([Block(), Block()])
        self.head, self.unused = nn.Linear(32, 5), nn.Linear(32, 5)

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x.mean((2, 3)))


def make():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval().requires_grad_(False)


def data(count=6):
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(4, 4, generator=g)  # channels depend on each other, as those of pictures do
    return [
        ((torch.einsum("ij,bjhw->bihw", mix, torch.randn(4, 4, 6, 6, generator=g)),), {})
        for _ in range(count)
    ]


@pytest.mark.parametrize("spec", ["w4-asym", "w4-g32"])
def test_output_is_closer_to_the_float_model(spec):
    config = QuantConfig(spec, rounding="l2.4", fallback=spec.replace("-g32", ""))
    calls, model, nearest, exact = data(), make(), make(), make()
    errors = reconstruct_(model, calls, config, ("blocks.?",), QUICK)
    quantize_(nearest, config)
    assert list(errors) == ["inlet", "blocks.0", "blocks.1", "head"]
    assert all(after <= before for before, after in errors.values())
    held_out = data(9)[6:]

    def error(net):
        return sum(float((net(*args) - exact(*args)).square().mean()) for args, _ in held_out)

    assert sum(after / before for before, after in errors.values()) < 0.8 * len(errors)
    assert error(model) < 0.95 * error(nearest)
    for name, module in model.named_modules():
        if not isinstance(module, QuantModule):
            continue
        twin = nearest.get_submodule(name)
        assert torch.equal(module.scale, twin.scale)
        moved = (module.codes().int() - twin.codes().int()).abs()
        assert moved.max() <= 1
        assert bool(moved.any()) == (name != "unused")
    assert str(model.unused.spec) == config.spec_for("unused") or spec == "w4-g32"


def test_the_result_is_a_quantized_model_like_another(tmp_path):
    model, path = make(), tmp_path / "model.safetensors"
    config = QuantConfig("w8a8", skip=("head",))
    reconstruct_(model, data(1), config, how=Reconstruction(steps=1))
    assert type(model.head) is nn.Linear and model.inlet.spec.act_bits == 8
    save_quantized(model, path)
    x = data(1)[0][0][0]
    assert torch.equal(load_quantized(make(), path)(x), model(x))


def test_it_is_reproducible():
    states = []
    for _ in range(2):
        model = make()
        reconstruct_(model, data(2), QuantConfig("w4"), how=Reconstruction(steps=5))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("calls", "blocks", "text"),
    [
        ([], (), "calls must be at least one forward pass, got none"),
        (data(1), ("x*",), r"blocks must be patterns that match a module, got 'x\*'"),
    ],
)
def test_refuses(calls, blocks, text):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text):
        reconstruct_(model, calls, QuantConfig("w4"), blocks)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("field", ["steps", "lr", "weight", "warmup"])
def test_bad_fields(field):
    with pytest.raises(ValueError, match=f"Reconstruction: {field} must be"):
        Reconstruction(**{field: -1})
