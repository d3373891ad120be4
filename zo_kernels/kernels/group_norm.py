# SPDX-License-Identifier: Apache-2.0
"""`group_norm` in Triton: activation((x + before) * by + after); see `zo_kernels.kernels._norm`.

Traffic: two reads of x and one write of y, in the dtype of x, channels_last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._norm import factors, launch_options, normalized
from zo_kernels.kernels.quantize_rows import piece


@triton.jit
def _group_norm_kernel(
    x_ptr,  # [B, size]
    factors_ptr,  # [B, 3, channels]
    y_ptr,  # [B, size]
    size, channels,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, i, start = piece(size, BLOCK)
    y = normalized(x_ptr, factors_ptr, sample.to(tl.int64), i, size, channels, ACTIVATION)
    tl.store(y_ptr + start + i, y.to(y_ptr.dtype.element_ty), i < size)


def group_norm_triton(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The arguments are those of the op, checked. x is copied unless it is channels_last."""
    pixels = x.permute(0, 2, 3, 1).contiguous()
    y = pixels.new_empty(pixels.shape)
    if len(x):
        size, options = pixels[0].numel(), launch_options()
        with torch.cuda.device_of(x):
            by = factors(pixels, groups, weight, bias, eps, shift)
            _group_norm_kernel[(len(x) * triton.cdiv(size, options["BLOCK"]),)](
                *(pixels, by, y, size, x.shape[1]), ACTIVATION=activation, **options
            )
    return y.permute(0, 3, 1, 2)
