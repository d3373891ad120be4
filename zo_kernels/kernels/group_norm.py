# SPDX-License-Identifier: Apache-2.0
"""`group_norm` in Triton: activation((x + before) * by + after); see `zo_kernels.kernels._norm`.

Traffic: two reads of x and one write of y, in the dtype of x, channels_last.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._norm import normalized, passes
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


def group_norm_triton(*args: Any) -> Tensor:
    """The arguments are those of the op, checked. x is copied unless it is channels_last."""
    pixels, run = passes(*args)
    y = pixels.new_empty(pixels.shape)
    run(_group_norm_kernel, y)
    return y.permute(0, 3, 1, 2)
