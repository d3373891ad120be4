# SPDX-License-Identifier: Apache-2.0
"""`group_norm_quantize` in Triton: `group_norm` and `quantize_rows` without the floats between.

Traffic: three reads of x, for the moments, the largest |y| and the codes, and one write of codes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._codes import codes_of, magnitude, scale_of
from zo_kernels.kernels._norm import normalized, passes
from zo_kernels.kernels.quantize_rows import piece


@triton.jit
def _group_norm_quantize_largest_kernel(
    x_ptr,  # [B, size]
    factors_ptr,  # [B, 3, channels]
    largest_ptr,  # [B], zeros before
    size, channels,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, i, _ = piece(size, BLOCK)
    y = normalized(x_ptr, factors_ptr, sample.to(tl.int64), i, size, channels, ACTIVATION)
    tl.atomic_max(largest_ptr + sample, tl.max(tl.where(i < size, magnitude(y), 0), 0))


@triton.jit
def _group_norm_quantize_codes_kernel(
    x_ptr, factors_ptr, largest_ptr,  # see above
    codes_ptr,  # [B, size]
    scale_ptr,  # [B]
    size, channels,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, i, start = piece(size, BLOCK)
    y = normalized(x_ptr, factors_ptr, sample.to(tl.int64), i, size, channels, ACTIVATION)
    largest = tl.load(largest_ptr + sample)
    tl.store(codes_ptr + start + i, codes_of(y, largest), i < size)
    tl.store(scale_ptr + sample, scale_of(largest))  # by each program of a sample, the same


def group_norm_quantize_triton(*args: Any) -> tuple[Tensor, Tensor]:
    """The arguments are those of the op, checked. x is copied unless it is channels_last."""
    pixels, run = passes(*args)
    codes = pixels.new_empty(pixels.shape, dtype=torch.int8)
    scale = pixels.new_empty(len(pixels), dtype=torch.float32)
    largest = torch.zeros(len(pixels), dtype=torch.int32, device=pixels.device)
    run(_group_norm_quantize_largest_kernel, largest)
    run(_group_norm_quantize_codes_kernel, largest, codes, scale)
    return codes.permute(0, 3, 1, 2), scale
