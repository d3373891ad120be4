# SPDX-License-Identifier: Apache-2.0
"""`qconv2d` in Triton: see `zo_kernels.kernels._product`.

x is int8, fp32, bf16 or fp16 [B, C, H, W]; it is copied unless channels_last. Traffic: x once for
each tap and each 32 to 128 output channels, mostly from L2, the packed weight once, y once.
"""

from typing import Any

from torch import Tensor

from zo_kernels.kernels._multiply import Picture, activations, multiply


def qconv2d_triton(call: Any, geometry: Any) -> Tensor:
    """The `ops._quantized.Call` and `ops.qconv2d.Geometry` of the op, checked; groups are 1."""
    batch, channels, *size = call.x.shape
    kernel, n = geometry.kernel_size, call.scale.shape[0]
    height, width = geometry.output_size(size)
    a, a_scale = activations(call, per_sample=True)
    a = a.permute(0, 2, 3, 1).contiguous()
    y = call.x.new_empty((batch, height, width, n), dtype=call.result_dtype)
    residual = call.residual
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1).reshape(-1, n)
    picture = Picture(
        *(tuple(size), (height, width), kernel[1]),
        *(tuple(geometry.stride), tuple(geometry.padding), tuple(geometry.dilation)),
    )
    where = {"taps": kernel[0] * kernel[1], "channels": channels, "picture": picture}
    multiply(call, a, a_scale, residual, y.view(-1, n), **where, rows_of_a_scale=height * width)
    return y.permute(0, 3, 1, 2)
