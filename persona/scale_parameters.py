# SPDX-License-Identifier: Apache-2.0
"""One set of scales of a quantized UNet as a parameter that any optimizer may train."""

from pathlib import Path

import torch
from torch import nn

from persona.families import StableDiffusion
from persona.intervals import Intervals
from persona.methods.scale_tuning import ScaleSets
from persona.scales import FILE, Switch, digest, save_scales


class ScaleParameters:
    """r of s = s0 (1 + r) for every output scale: PEQA's (arXiv 2305.14152), relative.

    Args:
        family: its UNet is quantized; its scales follow the parameter from now on.

    Attributes:
        parameters: name -> r, fp32 [P].
    """

    def __init__(self, family: StableDiffusion) -> None:
        self.unet = family.unet
        self.served = Intervals.uniform(1, len(family.abar))
        self.sets = ScaleSets(self.unet, ("scale",), 1, relative=True)
        own = nn.Parameter(self.sets.theta[0])
        self.sets.theta = [own]
        self.parameters = {"scales": own}
        self.switch = Switch(self.unet, self.served, self.sets.scales, self.sets.base)

    @torch.no_grad()
    def save(self, folder: Path, metadata: dict[str, str]) -> Path:
        """Write the scales as `persona.scales.load_scales` reads them."""
        self.switch.place(None)
        scales = self.sets.scales(0)
        save_scales(folder / FILE, [scales], self.served, digest(self.unet), metadata)
        return folder / FILE
