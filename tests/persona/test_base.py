# SPDX-License-Identifier: Apache-2.0
"""The frozen model of a run: which layers are held in how many bits."""

import pytest

from persona.base import quantize
from persona.config import RunConfig
from persona.families import StableDiffusion
from zo_kernels.nn import QuantModule


def specs(model):
    return {str(m.spec) for m in model.modules() if isinstance(m, QuantModule)}


@pytest.mark.parametrize(
    ("base", "activations", "unet", "others"),
    [
        ("as-loaded", "float", set(), set()),
        ("int8", "float", {"w8"}, {"w8"}),
        ("int8", "int8", {"w8a8"}, {"w8a8"}),
        ("int4", "float", {"w4-g64", "w8"}, {"w8"}),
        ("int4", "int8", {"w4a8-g64", "w8a8"}, {"w8a8"}),
    ],
)
def test_precisions(fresh_pipeline, base, activations, unet, others):
    family = StableDiffusion(fresh_pipeline())
    quantize(RunConfig(base_precision=base, activation_precision=activations), family)
    pipe = family.pipe
    assert specs(pipe.unet) == unet
    assert specs(pipe.text_encoder) == specs(pipe.vae) == others
