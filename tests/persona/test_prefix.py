# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from diffusers import UNet2DConditionModel

from persona.fused import fuse_
from persona.prefix import prefix, shared_prefix
from zo_kernels.quant import QuantConfig, quantize_

KINDS = {
    "attention first": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "attention second": ("DownBlock2D", "CrossAttnDownBlock2D"),
}


def make_unet(down):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=down,
            up_block_types=tuple(
                "CrossAttnUpBlock2D" if "Cross" in d else "UpBlock2D" for d in reversed(down)
            ),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    return unet.eval().requires_grad_(False)


@pytest.mark.parametrize("spec", ["", "w8", "w8a8"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_same_prediction_for_less(kind, spec):
    unet = make_unet(KINDS[kind])
    if spec:
        quantize_(unet, QuantConfig(spec))
        fuse_(unet)
    copies, count = 3, 2
    x = torch.randn(count, 4, 8, 8).repeat(copies, 1, 1, 1)
    t = torch.tensor([200, 700]).repeat(copies)
    text = torch.randn(copies * count, 5, 32)
    plain = unet(x, t, text).sample
    seen = []
    handles = [
        module.register_forward_hook(lambda m, args, out: seen.append(len(out)))
        for module in prefix(unet)
    ]
    with shared_prefix(unet, copies):
        shared = unet(x, t, text).sample
    for handle in handles:
        handle.remove()
    assert seen == [count] * len(prefix(unet)) and len(seen) >= (2 if spec else 5)
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5 * plain.abs().max().item())
    assert unet(x, t, text).sample.equal(plain)  # nothing stays behind


def test_what_the_prefix_holds_does_not_read_the_text():
    unet = make_unet(KINDS["attention first"])
    names = {module: name for name, module in unet.named_modules()}
    assert [names[module] for module in prefix(unet)] == [
        "conv_in",
        "down_blocks.0.resnets.0",
        "down_blocks.0.attentions.0.norm",
        "down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.attentions.0.transformer_blocks.0.norm1",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    ]
