# SPDX-License-Identifier: Apache-2.0
"""`group_norm_quantize` in Triton: `group_norm` and `quantize_rows` without the floats between.

Traffic: three reads of x, for the moments, the largest |y| and the codes, and one write of codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._norm import factors, launch_options, normalized
from zo_kernels.kernels.quantize_rows import codes_of, magnitude, piece, scale_of


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


def group_norm_quantize_triton(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """The arguments are those of the op, checked. x is copied unless it is channels_last."""
    pixels = x.permute(0, 2, 3, 1).contiguous()
    codes = pixels.new_empty(pixels.shape, dtype=torch.int8)
    scale = pixels.new_empty(len(x), dtype=torch.float32)
    largest = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    if len(x):
        size, channels, options = pixels[0].numel(), x.shape[1], launch_options()
        options["ACTIVATION"] = activation
        grid = (len(x) * triton.cdiv(size, options["BLOCK"]),)
        with torch.cuda.device_of(x):
            by = factors(pixels, groups, weight, bias, eps, shift)
            _group_norm_quantize_largest_kernel[grid](
                *(pixels, by, largest, size, channels), **options
            )
            _group_norm_quantize_codes_kernel[grid](
                *(pixels, by, largest, codes, scale, size, channels), **options
            )
    return codes.permute(0, 3, 1, 2), scale
