# SPDX-License-Identifier: Apache-2.0
"""`fuse_` changes how a model is computed, not what."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from persona import fused, fused_attention
from persona.fused import FusedResnetBlock2D, FusedUpsample2D, fuse_
from persona.fused_attention import FusedAttnProcessor, FusedTransformerBlock
from zo_kernels.nn import perturbed, set_scales_, trainable_scales
from zo_kernels.quant import QuantConfig, quantize_


def _unet(spec: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    quantize_(unet, QuantConfig(spec=spec, skip=("conv_in", "conv_out")))
    return unet.eval().requires_grad_(False)


def _run(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(s, generator=generator) for s in ((4, 4, 8, 8), (4, 7, 32)))
    with torch.inference_mode():
        return unet(x, torch.tensor([1, 300, 600, 999]), text).sample


def _assert_same(fused, before, spec, scales=None):
    """With int8 activations any last digit flips codes: then no further from floating ones."""
    if "a8" not in spec:
        assert (fused - before).norm() <= 1e-5 * before.norm()
        return
    floating = _unet(spec.replace("a8", ""))
    if scales is not None:
        trainable_scales(floating, ("in_scale",))
        set_scales_(floating, scales)
    exact = _run(floating)
    assert (fused - exact).norm() <= 1.15 * (before - exact).norm()
    assert (fused - before).norm() <= 0.06 * before.norm()


@pytest.mark.parametrize("spec", ["w8", "w8a8", "w4a8-g32"])
def test_same_prediction(spec):
    unet = _unet(spec)
    before, names = _run(unet), list(unet.state_dict())
    assert fuse_(unet) > 5
    assert fuse_(unet) == 0
    _assert_same(_run(unet), before, spec)
    assert list(unet.state_dict()) == names
    assert any(isinstance(m, FusedResnetBlock2D) for m in unet.modules())
    assert any(isinstance(p, FusedAttnProcessor) for p in unet.attn_processors.values())
    blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
    assert all(isinstance(m, FusedTransformerBlock) for m in blocks)


@pytest.mark.parametrize("spec", ["w8", "w8a8"])
def test_feed_forward_in_parts(spec, monkeypatch):
    unet = _unet(spec)
    fuse_(unet)
    whole = _run(unet)
    monkeypatch.setattr(fused_attention, "_GATE_VALUES", 5 * 4 * 256)  # 5 tokens of 4 pictures
    _assert_same(_run(unet), whole, spec)


@pytest.mark.parametrize("spec", ["w8", "w8a8"])
def test_a_processor_set_later_is_asked(spec):
    unet = _unet(spec)
    fuse_(unet)
    calls = []

    class Mine:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            calls.append(attn)
            return torch.zeros_like(hidden_states)

    unet.set_attn_processor(Mine())
    _run(unet)
    assert len(calls) == len(unet.attn_processors)


def test_perturbations_reach_the_fused_layers():
    unet = _unet("w8a8")
    fuse_(unet)
    probe = {"seed": 3, "draws": [1, 2], "coeffs": torch.tensor([0.1, -0.1])}
    base = _run(unet)
    with perturbed(unet, what="scale_relative", **probe):
        moved = _run(unet)
    assert not torch.allclose(moved, base)
    assert torch.equal(_run(unet), base)


def test_gradients_take_the_way_of_diffusers():
    unet = _unet("w8a8")
    fuse_(unet)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    unet(x, 5, torch.randn(1, 7, 32)).sample.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_float_models_and_other_blocks_stay():
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), layers_per_block=1, cross_attention_dim=32,
    )  # fmt: skip
    assert fuse_(unet) == 0


def _vae(spec: str) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    quantize_(vae, QuantConfig(spec=spec, fallback="w8a8" if "a8" in spec else "w8"))
    return vae.eval().requires_grad_(False)


def test_a_vae_is_fused_too():
    vae = _vae("w8")
    x = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        before = vae(x).sample
        assert fuse_(vae) > 0
        after = vae(x).sample
    assert (after - before).norm() <= 1e-5 * before.norm()
    assert not any(type(m) is ResnetBlock2D for m in vae.modules())


@pytest.mark.parametrize("spec", ["w8", "w4-g32"])
@pytest.mark.parametrize("rows", [1, 3, 7, 8])
def test_enlarged_by_rows(spec, rows, monkeypatch):
    vae = _vae(spec)
    fuse_(vae)
    x = torch.randn(2, 4, 8, 5)
    with torch.inference_mode():
        whole = vae.decode(x).sample
        monkeypatch.setattr(fused, "_ENLARGED_VALUES", rows * 4 * 2 * 32 * 5)
        parts = vae.decode(x).sample
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert any(isinstance(m, FusedUpsample2D) for m in vae.modules())


def test_int8_activations_are_enlarged_whole():
    """Their scale is of the whole picture."""
    vae = _vae("w8a8")
    fuse_(vae)
    assert not any(isinstance(m, FusedUpsample2D) for m in vae.modules())


@pytest.mark.parametrize("spec", ["w8", "w8a8"])
def test_same_prediction_with_input_scales(spec):
    """A layer with `in_scale` quantizes its input itself."""
    unet = _unet(spec)
    scales = trainable_scales(unet, ("in_scale",))
    scales = {k: torch.linspace(0.8, 1.2, v.numel()) for k, v in scales.items()}
    set_scales_(unet, scales)
    before = _run(unet)
    fuse_(unet)
    _assert_same(_run(unet), before, spec, scales)
