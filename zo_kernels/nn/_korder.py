# SPDX-License-Identifier: Apache-2.0
"""Weights as rows in the K order of `zo_kernels.packing`: k = tap * C + c, channels fastest."""

from collections.abc import Iterator, Sequence
from mmap import mmap

import torch
from torch import Tensor


def to_rows(weight: Tensor) -> Tensor:
    """[N, K] or [N, C, kh, kw] -> [N, K]; a copy only where channels do not run fastest."""
    return weight.movedim(1, -1).flatten(1)


def from_rows(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `to_rows`: a view, channels_last for a convolution."""
    n, channels, *taps = shape
    return rows.view(n, *taps, channels).movedim(-1, 1)


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """scale * (codes - zero_point) in fp32, each product rounded once.

    Args:
        codes: int8 [N, K] or [N, C, kh, kw].
        scale: fp32 [N], or [N, G] for groups of K / G columns in K order.
        zero_point: int8 of the shape of scale, or None.

    Returns:
        fp32 of the shape of `codes`.
    """
    n, groups = scale.shape[0], scale[0].numel()
    values = to_rows(codes).reshape(n, groups, -1).float()  # a difference of two codes is exact
    if zero_point is not None:
        values -= zero_point.reshape(n, groups, 1)
    values *= scale.reshape(n, groups, 1)
    return from_rows(values.view(n, -1), codes.shape)


def scratch(shape: Sequence[int], device: torch.device) -> Tensor:
    """Room for the codes of a weight [N, ...], int8 [N, K], until they are packed.

    On the CPU they are pages of their own: from the heap, each layer's would leave a hole between
    tensors that stay, and the holes would come to the size of the model.
    """
    rows = shape[0], torch.Size(shape[1:]).numel()
    if device.type != "cpu":
        return torch.empty(rows, dtype=torch.int8, device=device)
    return torch.frombuffer(mmap(-1, rows[0] * rows[1]), dtype=torch.int8).view(rows)


def chunks(weight: Tensor, elements: int) -> Iterator[slice]:
    """Slices of whole rows, of about so many elements, so that temporaries stay small."""
    step = max(1, elements * len(weight) // weight.numel())
    return (slice(start, start + step) for start in range(0, len(weight), step))
