# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) through peft, on float and on integer layers.

y = layer(x) + B A x with A [r, K] random, B [N, r] zero at first (alpha = r). Over integer layers
this is QLoRA (arXiv 2305.14314), without a dequantized weight.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from persona.errors import UserError
from persona.files import write_tensors
from persona.quiet import errors_only
from zo_kernels.nn import QuantConv2d, QuantLinear

with errors_only():
    from diffusers.utils import convert_state_dict_to_diffusers

try:
    from peft import LoraConfig, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
except ImportError as error:
    raise UserError(
        "trainable: must be something else where peft is missing, got lora; install it: "
        "pip install peft"
    ) from error

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
ADAPTER = "default"


class LoraQuantLinear(nn.Module, LoraLayer):
    """peft's LoRA around a `QuantLinear`, which is called as it is and never merged into."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: int = 1,
        **_: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    lora_A: Any  # name of the adapter -> layer; nn.ModuleDict knows no more
    lora_B: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = self.lora_A[name], self.lora_B[name]
                added = up(down(self.lora_dropout[name](x.to(down.weight.dtype))))
                y = y + (added * self.scaling[name]).to(y.dtype)
        return y


class LoraQuantConv2d(LoraQuantLinear):
    """The same around a `QuantConv2d`: A has the layer's kernel, B is 1 x 1, as in peft's own."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_channels, module.out_channels

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any
    ) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        layer: Any = self.get_base_layer()
        shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        device = layer.qweight.device
        self.lora_A[adapter_name] = nn.Conv2d(
            layer.in_channels, r, *shape, bias=False, device=device
        )
        self.lora_B[adapter_name] = nn.Conv2d(r, layer.out_channels, 1, bias=False, device=device)


class Lora:
    """Adapters on the layers of ``unet`` whose names end in one of ``targets``.

    Args:
        unet: of diffusers; its own parameters stay frozen.
        rank: r.
        targets: such as "to_q" or "to_out.0", with commas between them.
        seed: of A.

    Attributes:
        parameters: name -> A and B, fp32.

    Raises:
        UserError: no layer has such a name, or one is neither linear nor a convolution.
    """

    def __init__(self, unet: Any, rank: int, targets: str, seed: int) -> None:
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=[name.strip() for name in targets.split(",")],
        )
        config._register_custom_module({QuantLinear: LoraQuantLinear, QuantConv2d: LoraQuantConv2d})
        try:
            with torch.random.fork_rng(devices=[]):  # peft draws what is drawn anew below
                unet.add_adapter(config, ADAPTER)
        except ValueError as error:
            raise UserError(
                f"lora_targets: must name linear layers or convolutions of the UNet, got "
                f"{targets!r} ({str(error).splitlines()[0]}); to_k,to_q,to_v,to_out.0 are usual"
            ) from error
        self.unet = unet
        generator = torch.Generator().manual_seed(seed)
        for layer in unet.modules():
            if isinstance(layer, LoraLayer):
                self._reset(layer, generator)
        self.parameters = {n: p for n, p in unet.named_parameters() if p.requires_grad}

    @staticmethod
    @torch.no_grad()
    def _reset(layer: Any, generator: torch.Generator) -> None:
        """peft's own start, U(-1/sqrt(K), 1/sqrt(K)) and zero, from a generator of ours."""
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        bound = 1 / math.sqrt(down[0].numel())
        start = torch.empty(down.shape).uniform_(-bound, bound, generator=generator)
        down.copy_(start)
        up.zero_()

    def save(self, folder: Path, metadata: dict[str, str]) -> Path:
        """Write the adapters as ``pipe.load_lora_weights(folder)`` of diffusers reads them."""
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        tensors = {f"unet.{name}": tensor for name, tensor in state.items()}
        write_tensors(folder / FILE, tensors, {"format": "pt", **metadata})
        return folder / FILE
