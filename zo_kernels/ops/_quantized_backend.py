# SPDX-License-Identifier: Apache-2.0
"""The fast kernels of `quantize_rows`, `qlinear` and `qconv2d`, and what they can run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zo_kernels._registry import NAMESPACE, Backend, cpp_available
from zo_kernels.ops._quantized import Call


def _unregistered(op: str) -> str | None:
    name = f"{NAMESPACE}::{op}"
    dispatch = torch._C
    if dispatch._dispatch_has_kernel(name) and dispatch._dispatch_has_kernel_for_dispatch_key(
        name, "CPU"
    ):
        return None
    return "not in this build of the C++ library"


# Asked once: torch.compile can't trace the question.
_MISSING = {op: _unregistered(op) for op in ("quantize_rows", "qlinear", "qconv2d")}


def supports_quantize_rows(
    x: Tensor, per_sample: bool = False, in_scale: Tensor | None = None
) -> str | None:
    return "not for float64" if x.dtype == torch.float64 else None


def supports_qlinear(*args: Any) -> str | None:
    return _supports(Call(*args))


def supports_qconv2d(*args: Any) -> str | None:
    if args[9] != 1:
        return "only for groups=1"
    return _supports(Call(*args[:5], *args[10:]))


def _supports(call: Call) -> str | None:
    floats = (call.x, call.bias, call.residual)
    if any(t is not None and t.dtype == torch.float64 for t in floats):
        return "not for float64"
    return None


_SUPPORTS: dict[str, Callable[..., str | None]] = {
    "quantize_rows": supports_quantize_rows,
    "qlinear": supports_qlinear,
    "qconv2d": supports_qconv2d,
}


def backends(op: str) -> tuple[Backend, ...]:
    """C++, which registers its own kernels."""
    return (Backend("cpp", "cpu", lambda: cpp_available() or _MISSING[op], _SUPPORTS[op]),)
