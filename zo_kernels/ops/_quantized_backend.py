# SPDX-License-Identifier: Apache-2.0
"""The fast kernels of `quantize_rows`, `qlinear` and `qconv2d`, and what they can run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zo_kernels._registry import Backend, cpp_available
from zo_kernels.ops._quantized import Call

GROUP_STEP = 8  # codes; those of a 4-bit step of a packed weight


def supports_quantize_rows(
    x: Tensor, per_sample: bool = False, in_scale: Tensor | None = None
) -> str | None:
    return "not for float64" if x.dtype == torch.float64 else None


def supports_qlinear(*args: Any) -> str | None:
    call = Call(*args)
    return _supports(call, call.x.shape[-1])


def supports_qconv2d(*args: Any) -> str | None:
    kernel_size, groups = args[5], args[9]
    if groups != 1:
        return "only for groups=1"
    call = Call(*args[:5], *args[10:])
    return _supports(call, call.x.shape[1] * kernel_size[0] * kernel_size[1])


def _supports(call: Call, k: int) -> str | None:
    floats = (call.x, call.bias, call.residual)
    dtypes = {call.result_dtype, *(t.dtype for t in floats if t is not None)}
    if torch.float64 in dtypes:
        return "not for float64"
    if call.scale_groups > 1 and k // call.scale_groups % GROUP_STEP:
        return f"only for groups of a multiple of {GROUP_STEP} codes"
    return None


_SUPPORTS: dict[str, Callable[..., str | None]] = {
    "quantize_rows": supports_quantize_rows,
    "qlinear": supports_qlinear,
    "qconv2d": supports_qconv2d,
}


def backends(op: str) -> tuple[Backend, ...]:
    """C++, which registers its own kernels."""
    return (Backend("cpp", "cpu", cpp_available, _SUPPORTS[op]),)
