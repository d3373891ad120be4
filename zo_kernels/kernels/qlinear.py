# SPDX-License-Identifier: Apache-2.0
"""`qlinear` in Triton: see `zo_kernels.kernels._product`.

x is int8, fp32, bf16 or fp16 [..., K]; the packed weight is read as it lies. Traffic: x once for
each 32 to 128 output channels, the weight once, y once.

With few rows (1 to 16) the floor is the weight: N K bits / 8 bytes, and 4 for each scale, over the
rate of memory. So programs are many and small (`_tiles.FEW_PROGRAMS`), each of its own piece of k;
codes come 16 bytes at a time and are unpacked in registers. On top of the floor come the sums, 4
bytes for each of M N outputs and each piece of k, written and read through L2, and a second launch
that joins them. `_few_rows` does without them, if asked for. Not yet confirmed on a GPU.
"""

from typing import Any

from torch import Tensor

from zo_kernels import _env
from zo_kernels.kernels import _few_rows
from zo_kernels.kernels._multiply import activations, multiply


def qlinear_triton(call: Any) -> Tensor:
    """The `ops._quantized.Call` of the op, checked. x is copied where its rows are strided."""
    if _env.cuda_cpp() and _few_rows.supports(call) is None:
        return _few_rows.few_rows_cpp(call)
    k, n = call.x.shape[-1], call.scale.shape[0]
    a, a_scale = activations(call, per_sample=False)
    a = a.reshape(-1, k)
    if a.stride(1) != 1:
        a = a.contiguous()
    y = call.x.new_empty((*call.x.shape[:-1], n), dtype=call.result_dtype)
    residual = None if call.residual is None else call.residual.reshape(-1, n)
    multiply(call, a, a_scale, residual, y.view(-1, n), 1, k, rows_of_a_scale=1)
    return y
