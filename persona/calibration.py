# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization of a UNet in the manner of Q-Diffusion (arXiv 2302.04304).

What the UNet sees while it draws pictures calibrates it: timesteps spread over the trajectory, with
and without a prompt. Q-Diffusion takes 25 of 50 steps of PLMS, 128 pictures and 20,000 steps a
block; the defaults here are for tiny-sd and minutes.
"""

from collections.abc import Sequence
from typing import Any

import torch

from persona.families import StableDiffusion
from persona.fused import fuse_
from zo_kernels.quant import QuantConfig, Reconstruction, reconstruct_
from zo_kernels.quant.calibrate import Call

BLOCKS = ("*resnets.?", "*transformer_blocks.?")
CONFIG = QuantConfig("w4-asym", rounding="l2.4", overrides=(("conv_in", "w8"), ("conv_out", "w8")))


def record(
    family: StableDiffusion,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 50,
    every: int = 2,
    guidance: float = 7.5,
    batch: int = 8,
) -> list[Call]:
    """Inputs of the UNet at every `every`-th step of the sampler; half of the samples of a call are
    without their prompt.

    Args:
        prompts: one picture each, `batch` of them in a call.
        steps, guidance: of the sampler; guidance above 1, or there is nothing without a prompt.
    """
    calls: list[Call] = []
    count = 0

    def hook(unet: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        if count % every == 0:
            text = kwargs["encoder_hidden_states"]
            calls.append(((args[0].clone(), args[1].clone(), text.clone()), {}))
        count += 1

    handle = family.unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for start in range(0, len(prompts), batch):
            some = list(prompts[start : start + batch])
            count = 0
            family.sample(some, seed=seed + start, steps=steps, guidance=guidance, batch=batch)
    finally:
        handle.remove()
    return calls


def calibrate(
    family: StableDiffusion,
    prompts: Sequence[str],
    config: QuantConfig = CONFIG,
    how: Reconstruction | None = None,
    **sampling: Any,
) -> dict[str, tuple[float, float]]:
    """Quantize the UNet of `family` by `reconstruct_` on what it sees while it draws `prompts`.

    Args:
        config: default: 4 bits, asymmetric by channel, first and last layer 8 bits.
        how: length of the reconstruction of each block.
        sampling: see `record`.

    Returns:
        Errors of each block; see `zo_kernels.quant.reconstruct_`.
    """
    unet = family.unet
    with torch.no_grad():
        calls = record(family, prompts, **sampling)
    errors = reconstruct_(unet, calls, config, BLOCKS, how)
    fuse_(unet)
    return errors
