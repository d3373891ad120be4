# SPDX-License-Identifier: Apache-2.0
"""Write torchao/*.safetensors: what torchao 0.18.0 makes of a small model, and what
it dequantizes. Run it in an environment that has torchao: `python tests/golden/make_torchao.py`.

It is not installed with the tests, because diffusers imports it wherever it finds it.
"""

from pathlib import Path

import torch
import torchao
from safetensors.torch import save_file
from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType

FOLDER = Path(__file__).with_name("torchao")
ROWS = [PerTensor(), PerRow()]  # of activations, of weights
CONFIGS = {
    "rows": Int8WeightOnlyConfig(),
    "groups": Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
    "dynamic": Int8DynamicActivationInt8WeightConfig(),
    "dynamic_asymmetric": Int8DynamicActivationInt8WeightConfig(
        act_mapping_type=MappingType.ASYMMETRIC
    ),
    "dynamic_tensor": Int8DynamicActivationInt8WeightConfig(granularity=ROWS),
}


def make(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 9), nn.LayerNorm(9), nn.Linear(9, 5, bias=False)).to(dtype)


def main():
    assert torchao.__version__.startswith("0.18.0"), torchao.__version__
    FOLDER.mkdir(exist_ok=True)
    runs = [(name, torch.float32) for name in CONFIGS] + [("dynamic", torch.bfloat16)]
    for name, dtype in runs:
        model = make(dtype)
        # Groups of 32 divide the first layer only.
        quantize_(model[:1] if name == "groups" else model, CONFIGS[name])
        tensors, metadata = flatten_tensor_state_dict(model.state_dict())
        for layer in ("0", "2"):
            weight = model.get_submodule(layer).weight
            if type(weight).__name__ == "Int8Tensor":
                tensors[f"expected.{layer}"] = weight.dequantize()
        suffix = "" if dtype == torch.float32 else "_bfloat16"
        save_file(tensors, FOLDER / f"{name}{suffix}.safetensors", metadata)


main()
