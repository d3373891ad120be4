# SPDX-License-Identifier: Apache-2.0
"""LoRA around integer layers: peft's own around a layer with the dequantized weight."""

import copy
import importlib
import sys

import pytest
import torch
from torch import nn

from persona.errors import UserError
from persona.lora import ADAPTER, Lora
from zo_kernels.quant import QuantConfig, dequantize, quantize_

TARGETS = "to_q,to_out.0,conv1,conv2,conv_shortcut,proj_in"


def adapted(unet):
    """Adapters with a B that is not zero, the same for every model of this shape."""
    lora = Lora(unet, 3, TARGETS, seed=5)
    for i, p in enumerate(lora.parameters.values()):
        if not p.any():
            nn.init.normal_(p.detach(), std=0.1, generator=torch.Generator().manual_seed(i))
    return lora


def dequantized(quantized, like):
    """`like` with the weights that the integers of `quantized` stand for."""
    out = copy.deepcopy(like)
    for name, module in quantized.named_modules():
        if hasattr(module, "qweight"):
            out.get_submodule(name).weight = nn.Parameter(dequantize(module))
    return out.requires_grad_(False)


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, 8, 8, generator=g),
        torch.tensor([10, 500]),
        torch.randn(2, 20, 32, generator=g),
    )


@pytest.mark.parametrize("spec", ["w8", "w4-g32"])
def test_outputs_and_gradients_are_those_of_the_dequantized_model(fresh_pipeline, inputs, spec):
    unet = fresh_pipeline().unet.requires_grad_(False)
    quantized = copy.deepcopy(unet)
    quantize_(quantized, QuantConfig(spec, fallback="w8"))
    reference = adapted(dequantized(quantized, unet))
    ours = adapted(quantized)
    assert ours.parameters.keys() == reference.parameters.keys()
    gradients = []
    for lora in (ours, reference):
        y = lora.unet(*inputs).sample
        y.square().sum().backward()
        gradients.append([y.detach(), *(p.grad for p in lora.parameters.values())])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=2e-3, atol=2e-4 * float(b.abs().max()))


def test_a_new_adapter_changes_nothing_and_can_be_switched_off(fresh_pipeline, inputs):
    unet = fresh_pipeline().unet.requires_grad_(False)
    quantize_(unet, QuantConfig("w8"))
    with torch.no_grad():
        before = unet(*inputs).sample
        Lora(unet, 2, TARGETS, seed=0)
        assert unet(*inputs).sample.equal(before)
        for p in unet.parameters():
            if p.requires_grad:
                p.add_(0.1)
        assert not unet(*inputs).sample.equal(before)
        unet.disable_adapters()
        assert unet(*inputs).sample.equal(before)


def test_the_start_is_of_the_seed_alone(fresh_pipeline):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = Lora(fresh_pipeline().unet, 2, "to_q", seed=0)
    assert torch.random.get_rng_state().equal(state)
    torch.manual_seed(2)
    again, other = (Lora(fresh_pipeline().unet, 2, "to_q", seed=s) for s in (0, 1))
    for name, p in first.parameters.items():
        assert p.equal(again.parameters[name])
        assert f".{ADAPTER}." in name and p.equal(other.parameters[name]) == (not p.any())


def test_a_target_that_no_layer_has(fresh_pipeline):
    with pytest.raises(UserError, match=r"lora_targets: must name .*, got 'to_x' .*; to_k"):
        Lora(fresh_pipeline().unet, 2, "to_x", seed=0)


def test_without_peft_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "persona.lora")
    with pytest.raises(UserError, match=r"^trainable: must be .* peft is missing, got lora; "):
        importlib.import_module("persona.lora")
