# SPDX-License-Identifier: Apache-2.0
"""Weights and perturbations for the examples of `qlinear` and `qconv2d`."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from zo_kernels import rng
from zo_kernels.ops._quantized import FLOATS, PERTURBATIONS
from zo_kernels.packing import pack


def examples(
    shape: Sequence[int], parts: Sequence[int]
) -> Iterator[tuple[dict[str, Any], torch.dtype, dict[str, Any]]]:
    """What describes a weight of `shape` in 8 and in 4 bits, with one or several scales for a row
    and with zero points or not; a dtype of x; and what describes a perturbation of it."""
    g = torch.Generator().manual_seed(0)
    where = {"seed": -5, "stream": rng.WORD, "draws": [3, -(2**40)], "headroom": 2}
    for i, (bits, zero) in enumerate(((8, False), (8, True), (4, True), (4, False))):
        codes = torch.randint(-7, 8, tuple(shape), dtype=torch.int8, generator=g)
        scale = torch.linspace(1e-3, 2e-3, shape[0] * parts[i]).view(shape[0], parts[i])
        scale = scale.squeeze(1) if parts[i] == 1 else scale
        zero_point = torch.randint(-4, 4, scale.shape, dtype=torch.int8, generator=g)
        weight = {"qweight": pack(codes, bits), "scale": scale, "bits": bits}
        weight |= {"zero_point": zero_point} if zero else {}
        coeffs = torch.tensor([1.0, -2.0])
        yield weight, FLOATS[i], where | {"coeffs": coeffs, "perturb": PERTURBATIONS[1 + i]}
