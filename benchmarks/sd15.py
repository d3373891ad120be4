# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.5's UNet at its true size, with seeded random weights.

Time and memory of a forward pass depend on shapes and formats, not on what was learned. The weights
are bounded and keep the variance of their inputs, so that outputs of two stacks can be compared.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

TIMESTEP = 500
TOKENS = 77


@dataclass(frozen=True)
class Architecture:
    """A UNet and what goes into it: latents [B, 4, size, size], text [B, 77, text]."""

    title: str
    size: int
    text: int
    config: dict[str, Any]


ARCHITECTURES = {
    # The published unet/config.json; what it does not name has diffusers' default.
    "sd15": Architecture(
        "Stable Diffusion 1.5's UNet",
        64,
        768,
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
    ),
    # Every kind of block of it in 1.2 M parameters, for the tests of the harness.
    "tiny": Architecture(
        "a tiny UNet",
        16,
        64,
        {
            "sample_size": 16,
            "block_out_channels": (64, 128),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 64,
            "attention_head_dim": 2,
        },
    ),
}


def meta_unet(name: str) -> Any:
    """The UNet without values (fp32 on the meta device), in eval mode."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**ARCHITECTURES[name].config)
    return unet.eval().requires_grad_(False)


def unet(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The UNet with random values, convolutions channels_last; no second copy of it is made.

    Weights are uniform within +-sqrt(3 / fan_in); scales of norms within 1 +- 0.1, biases within
    +-0.1. A bf16 model has the fp32 model's values, rounded.
    """
    model = meta_unet(name)
    generator = torch.Generator()
    for index, (full_name, parameter) in enumerate(list(model.named_parameters())):
        generator.manual_seed(1_000_003 * seed + index)
        owner, _, leaf = full_name.rpartition(".")
        module = model.get_submodule(owner)
        values = _values(parameter, leaf, generator, dtype)
        setattr(module, leaf, nn.Parameter(values, requires_grad=False))
    return model


def _values(like: Tensor, leaf: str, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    bound, middle = 0.1, float(leaf == "weight")
    if like.dim() > 1:
        bound, middle = (3 / like[0].numel()) ** 0.5, 0.0
    values = torch.empty(like.shape).uniform_(middle - bound, middle + bound, generator=generator)
    layout = torch.channels_last if like.dim() == 4 else torch.contiguous_format
    return values.to(dtype, memory_format=layout)


def inputs(name: str, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents fp32 [B, 4, size, size], timesteps int64 [B], text fp32 [B, 77, text]: all random,
    every sample another one."""
    architecture = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, architecture.size, architecture.size, generator=generator)
    text = torch.randn(batch, TOKENS, architecture.text, generator=generator)
    return latents, torch.full((batch,), TIMESTEP), text


@dataclass(frozen=True)
class LinearShape:
    """A product [M, K] x [N, K]^T, and how many layers of the UNet make it; M at batch 1."""

    m: int
    n: int
    k: int
    layers: int


@dataclass(frozen=True)
class ConvShape:
    """A convolution of [1, C, size, size] to N channels, and how many layers make it."""

    size: int
    c: int
    n: int
    kernel: int
    stride: int
    layers: int

    @property
    def out(self) -> int:
        return self.size // self.stride

    @property
    def macs(self) -> int:
        return self.out**2 * self.n * self.c * self.kernel**2


@cache
def shapes(name: str = "sd15") -> tuple[tuple[LinearShape, ...], tuple[ConvShape, ...]]:
    """Every distinct product and convolution of one forward at batch 1, found by running the model
    on the meta device; most costly first."""
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def stand_in(module: nn.Module) -> Callable[[Tensor], Tensor]:
        """Counts the layer and answers with a tensor of the right shape."""

        def linear(x: Tensor) -> Tensor:
            rows = x.shape[:-1].numel()
            counts["linear", (rows, module.out_features, module.in_features)] += 1
            return x.new_empty((*x.shape[:-1], module.out_features))

        def conv(x: Tensor) -> Tensor:
            kernel, stride = module.kernel_size[0], module.stride[0]
            c, n, size = module.in_channels, module.out_channels, x.shape[-1]
            counts["conv", (size, c, n, kernel, stride)] += 1
            return x.new_empty((len(x), n, size // stride, size // stride))

        return linear if isinstance(module, nn.Linear) else conv

    model = meta_unet(name)
    for module in _leaves(model):
        module.forward = stand_in(module)
    with torch.no_grad():
        model(*(x.to("meta") for x in inputs(name, 1)))
    linears = [LinearShape(*key, n) for (kind, key), n in counts.items() if kind == "linear"]
    convs = [ConvShape(*key, n) for (kind, key), n in counts.items() if kind == "conv"]
    linears.sort(key=lambda s: -s.m * s.n * s.k * s.layers)
    convs.sort(key=lambda s: -s.macs * s.layers)
    return tuple(linears), tuple(convs)


def _leaves(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
