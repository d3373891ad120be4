# SPDX-License-Identifier: Apache-2.0
"""Real model classes of diffusers and transformers, quantized."""

import pytest
import torch
from torch import nn

from zo_kernels.nn import QuantConv2d, QuantLinear, perturbed
from zo_kernels.quant import QuantConfig, quantize_

SQNR = {"unet": 34, "text_encoder": 34, "vae": 28}  # dB of the output; measured 37.5, 37.4, 31.7


def run(model, inputs):
    with torch.no_grad():
        return model(*inputs)[0]


def sqnr(clean, noisy):
    return (20 * torch.log10(clean.norm() / (noisy - clean).norm())).item()


def generate(pipe):
    return torch.from_numpy(
        pipe(
            "a red dog",
            num_inference_steps=3,
            height=16,
            width=16,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
    )


def test_every_layer_is_replaced_and_the_output_stays_close(model_and_inputs, request):
    model, inputs = model_and_inputs
    before = run(model, inputs)
    count = sum(isinstance(m, nn.Linear | nn.Conv2d) for m in model.modules())
    report = quantize_(model)
    assert len(report.quantized) == count and not report.skipped
    assert not any(isinstance(m, nn.Linear | nn.Conv2d) for m in model.modules())
    assert report.bytes_after < 0.7 * report.bytes_before
    kind = request.node.callspec.params["model_and_inputs"]
    assert sqnr(before, run(model, inputs)) > SQNR[kind]


# dB of the output of unet, text_encoder and vae; random weights are harder than trained ones.
MEASURED = {
    QuantConfig("w8a8"): (28.1, 35.2, 21.2),
    QuantConfig("w8-g32", fallback="w8"): (38.1, 38.5, 31.5),
    QuantConfig("w4a8-g32", "mse", fallback="w8a8"): (14.7, 13.4, 9.7),
    QuantConfig("w4-g32-asym", fallback="w8"): (14.2, 15.4, 9.7),
}


@pytest.mark.parametrize("config", MEASURED, ids=lambda config: config.spec)
def test_formats_on_whole_models(model_and_inputs, config, request):
    model, inputs = model_and_inputs
    before = run(model, inputs)
    report = quantize_(model, config)
    assert config.spec in report.quantized.values()
    kind = list(SQNR).index(request.node.callspec.params["model_and_inputs"])
    assert sqnr(before, run(model, inputs)) > MEASURED[config][kind] - 2


def test_one_pass_over_a_unet_evaluates_several_perturbations(unet):
    """What each sample gives alone, so that members of a batch are not coupled."""
    quantize_(unet, QuantConfig("w8a8", headroom=1))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 8, 8, generator=g).expand(4, -1, -1, -1)
    text = torch.randn(1, 7, 32, generator=g).expand(4, -1, -1)
    draws, coeffs = [5, 5, 2**33, 2**33], [1.0, -1.0, 1.0, -1.0]
    with torch.no_grad():
        for what in ("scale_relative", "codes"):
            scaled = [c * (1 if what == "codes" else 1e-2) for c in coeffs]
            with perturbed(unet, seed=3, draws=draws, coeffs=scaled, what=what) as streams:
                together = unet(x, torch.tensor(5), text)[0]
            assert len(streams) == len(set(streams.values())) > 50
            for p in range(4):
                options = {"draws": [draws[p]], "coeffs": [scaled[p]], "what": what}
                with perturbed(unet, seed=3, **options):
                    alone = unet(x[:1], torch.tensor(5), text[:1])[0]
                assert sqnr(alone, together[p : p + 1]) > 40
            assert sqnr(together[:1], together[1:2]) < 40


def test_dtype_and_device_of_the_model_answer_as_before(model_and_inputs):
    model, _ = model_and_inputs
    quantize_(model)
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantConv2d):
            assert module.qweight.dtype == torch.uint8 and module.scale.dtype == torch.float32
            assert module.weight.dtype == torch.bfloat16
            assert next(module.parameters(), module.weight).dtype == torch.bfloat16


def test_attributes_that_pipelines_read(unet):
    quantize_(unet)
    assert (unet.conv_in.in_channels, unet.conv_in.out_channels) == (4, 32)
    assert unet.conv_in.kernel_size == (3, 3)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert (attention.to_q.in_features, attention.to_q.weight.dtype) == (64, torch.float32)
    assert attention.to_q.weight.device == unet.device


def test_fusing_projections_of_a_quantized_model_is_refused(unet):
    """diffusers concatenates `to_q.weight.data` and its siblings."""
    quantize_(unet)
    with pytest.raises(TypeError, match="quantized module: weight must be read for shape"):
        unet.fuse_qkv_projections()


def test_gradient_reaches_the_text_embedding(unet):
    """What textual inversion by backpropagation needs."""
    quantize_(unet)
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=g)
    text = torch.randn(1, 7, 32, generator=g).requires_grad_()
    direction = torch.randn(1, 7, 32, generator=g)

    def loss(embedding):
        return unet(latents, torch.tensor(500), embedding).sample.double().square().sum()

    (gradient,) = torch.autograd.grad(loss(text), text)
    with torch.no_grad():
        step = 1e-2 * direction
        difference = (loss(text + step) - loss(text - step)) / 2e-2
    torch.testing.assert_close(
        (gradient * direction).sum().double(), difference, rtol=5e-2, atol=1e-3
    )


def test_pipeline_runs_end_to_end(pipeline):
    before = generate(pipeline)
    for model in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        quantize_(model)
    after = generate(pipeline)
    assert sqnr(before, after) > 30
    assert torch.equal(generate(pipeline), after)


def test_pipeline_moves_to_bfloat16(pipeline):
    for model in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        quantize_(model)
    before = generate(pipeline)
    pipeline.to(torch.bfloat16)
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16
    assert sqnr(before, generate(pipeline)) > 15


def test_first_and_last_layers_can_be_left(unet):
    report = quantize_(unet, QuantConfig(skip=("conv_in", "conv_out")))
    assert list(report.skipped) == ["conv_in", "conv_out"]
    assert type(unet.conv_in) is nn.Conv2d


def test_unet_compiles_without_breaks(unet):
    quantize_(unet, QuantConfig())
    block = unet.down_blocks[0].resnets[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, time = torch.ones(1, 32, 8, 8), torch.ones(1, 128)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, time), block(x, time))
