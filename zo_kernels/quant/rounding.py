# SPDX-License-Identifier: Apache-2.0
"""From a float weight to integers: each rule maps a weight to (codes, scale).

A rule sees the weight of one layer, output channels first, and returns codes int8 of the same shape
and scale fp32 [N], so that `weight[n] ~ codes[n] * scale[n]`. `ROUNDINGS` names the rules that a
`QuantConfig` can ask for; a calibrated rule is one more entry.
"""

import torch
from torch import Tensor

from zo_kernels.nn._base import Rounding

CODE_MAX = 127  # -128 stays unused, so that codes are symmetric and negation is exact


def absmax(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output channel: scale = max|w| / 127, codes = round(w / scale), ties to
    even, as optimum-quanto's `AbsmaxOptimizer` with qint8 does on axis 0 (ZOODiP's quantizer).

    A channel of zeros, or one whose scale is below fp32's smallest normal number, gets that number
    as scale: its codes stay finite and the product stays (nearly) zero.

    Args:
        weight: floating [N, ...], N output channels; finite.

    Returns:
        codes int8 [N, ...] in the memory layout of `weight`, and scale fp32 [N].
    """
    w = weight.detach().float()
    scale = w.abs().flatten(1).amax(1) / CODE_MAX  # [N]
    scale.clamp_(min=torch.finfo(torch.float32).tiny)
    per_channel = scale.view(-1, *[1] * (w.dim() - 1))
    codes = (w / per_channel).round_().clamp_(-CODE_MAX, CODE_MAX).to(torch.int8)
    return codes, scale


ROUNDINGS: dict[str, Rounding] = {"absmax": absmax}
