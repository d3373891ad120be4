# SPDX-License-Identifier: Apache-2.0
"""`qlinear` of 1 to 16 rows of bf16 or fp16 by CUDA C++ (csrc/cuda/qlinear.cuh), if asked for.

`call` is an `ops._quantized.Call`, checked; its module imports this one, not the other way round.
"""

from typing import Any

import torch
from torch import Tensor

from zo_kernels import _native

MOST_ROWS = 16
CHUNK = 64  # channels that a warp takes at a time
_ALIGNMENT = 16  # bytes


def supports(call: Any) -> str | None:
    """None, or why Triton has to run the call."""
    x, k = call.x, call.x.shape[-1]
    if x.dtype not in (torch.bfloat16, torch.float16) or call.is_integer:
        return "only for bfloat16 or float16 x that is not rounded"
    if not 0 < x.numel() <= MOST_ROWS * k:
        return f"only for 1 to {MOST_ROWS} rows"
    if call.perturb != "none" or call.activation != "none":
        return "only without a perturbation or an activation"
    if call.in_scale is not None or call.residual is not None:
        return "only without in_scale or residual"
    if k % CHUNK or k // CHUNK % call.scale_groups:
        return f"only for groups of a multiple of {CHUNK} codes"
    if x.data_ptr() % _ALIGNMENT or call.qweight.data_ptr() % _ALIGNMENT:
        return f"only for addresses that are a multiple of {_ALIGNMENT}"
    return None


def few_rows_cpp(call: Any) -> Tensor:
    """The result of a call that `supports` lets pass. x is copied where it is strided.

    Raises:
        RuntimeError: the CUDA C++ kernels were not built.
    """
    _native.require_cuda()
    k, n = call.x.shape[-1], call.scale.shape[0]
    y = call.x.new_empty((*call.x.shape[:-1], n), dtype=call.result_dtype)
    more = [None if t is None else t.contiguous() for t in (call.zero_point, call.bias)]
    torch.ops.zo_kernels._qlinear_few_rows(
        *(call.x.reshape(-1, k).contiguous(), call.qweight, call.scale.contiguous(), *more),
        *(call.bits, y.view(-1, n)),
    )
    return y
