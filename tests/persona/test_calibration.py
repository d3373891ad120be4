# SPDX-License-Identifier: Apache-2.0
"""A UNet that is quantized by what it sees while it draws pictures."""

import torch

from persona.calibration import calibrate, record
from persona.families import StableDiffusion
from zo_kernels.nn import QuantModule
from zo_kernels.quant import QuantConfig, Reconstruction

PROMPTS = ["a photo of a dog", "a photo of a cat", "a photo of a toy"]


def test_calls_are_of_the_whole_trajectory_with_and_without_prompts(fresh_pipeline):
    family = StableDiffusion(fresh_pipeline())
    calls = record(family, PROMPTS, steps=6, every=2, batch=2)
    assert [len(args[0]) for args, _ in calls] == [4, 4, 4, 2, 2, 2]  # both halves
    steps = [int(args[1]) for args, _ in calls[:3]]
    assert steps == sorted(steps, reverse=True) and steps[0] > 700 and steps[-1] < 400
    empty, text = calls[0][0][2].chunk(2)
    assert torch.equal(empty[0], empty[1]) and not torch.equal(text[0], text[1])
    with torch.no_grad():
        for args, kwargs in calls:
            family.pipe.unet(*args, **kwargs)


def test_a_calibrated_pipeline_draws(fresh_pipeline):
    family = StableDiffusion(fresh_pipeline())
    config = QuantConfig("w4-asym", rounding="l2.4")
    how = Reconstruction(steps=2)
    errors = calibrate(family, PROMPTS[:1], config, how, steps=2, every=1)
    unet = family.pipe.unet
    assert "down_blocks.0.resnets.0" in errors and "conv_in" in errors
    assert any(name.endswith("transformer_blocks.0") for name in errors)
    assert all(after <= before for before, after in errors.values())
    specs = {str(m.spec) for m in unet.modules() if isinstance(m, QuantModule)}
    assert specs == {"w4-asym"}
    assert family.sample(PROMPTS[:1], seed=0, steps=2, guidance=5.0)
