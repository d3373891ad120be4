# SPDX-License-Identifier: Apache-2.0
"""The fast kernels of `quantize_rows`, `qlinear`, `qconv2d` and of what stands between, and what
they can run."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from zo_kernels._registry import Backend, cpp_available
from zo_kernels.kernels._triton import triton_available
from zo_kernels.ops._quantized import Call, check_steps

GROUP_STEP = {"cpp": 8, "triton": 32}  # codes: a 4-bit step of a packed weight; an int8 product
MOST_ROWS = 2**31 - 1  # what Triton counts in 32 bits: output rows, or elements of a picture


def supports_quantize_rows(
    backend: str, x: Tensor, per_sample: bool = False, in_scale: Tensor | None = None
) -> str | None:
    if x.dtype == torch.float64:
        return "not for float64"
    if backend != "triton":
        return None
    return _too_many(x.numel() // (max(1, x.shape[0]) if per_sample else x.shape[-1]))


def supports_rows(backend: str, x: Tensor, *_: object) -> str | None:
    return supports_quantize_rows(backend, x)


def supports_qlinear(backend: str, *args: Any) -> str | None:
    call = Call(*args)
    k = call.x.shape[-1]
    if backend == "triton" and (why := _too_many(call.x.numel() // k)) is not None:
        return why
    return _supports(backend, call, k)


def supports_qconv2d(backend: str, *args: Any) -> str | None:
    kernel_size, _, padding, _, groups = args[5:10]
    if groups != 1:
        return "only for groups=1"
    call = Call(*args[:5], *args[10:])
    batch, channels, height, width = call.x.shape
    if backend == "triton":
        rows = batch * (height + 2 * padding[0]) * (width + 2 * padding[1])
        if (why := _too_many(max(rows, call.x.numel() // max(1, batch)))) is not None:
            return why
    return _supports(backend, call, channels * kernel_size[0] * kernel_size[1])


def _too_many(count: int) -> str | None:
    if count > MOST_ROWS:
        return "only for less than 2^31 rows, or elements of a picture"
    return None


def _supports(backend: str, call: Call, k: int) -> str | None:
    if call.out_dtype == torch.float64:
        return "not for float64"
    for floats in (call.x, call.bias, call.residual):
        if floats is not None and floats.dtype == torch.float64:
            return "not for float64"
    groups = call.scale_groups
    if groups > 1 and k // groups % GROUP_STEP[backend]:
        return f"only for groups of a multiple of {GROUP_STEP[backend]} codes"
    return None


def launch(op: str, *args: Any) -> Any:
    """The Triton launcher of `op`, whose file is imported at the first call."""
    if args and isinstance(args[0], Call) and args[0].perturb == "codes":
        assert args[0].coeffs is not None
        check_steps(op, args[0].coeffs, args[0].headroom)
    module = import_module(f"zo_kernels.kernels.{op}")
    return getattr(module, f"{op}_triton")(*args)


def backends(
    op: str, supports: Callable[..., str | None], triton: Callable[..., Any] | None = None
) -> tuple[Backend, ...]:
    """C++, which registers its own kernels, and Triton.

    Args:
        supports: name of a backend and arguments of the schema -> None, or why it can't run them.
        triton: takes the arguments of the schema to `launch`; None where that takes them as is.
    """
    triton = triton or partial(launch, op)
    return (
        Backend("cpp", "cpu", cpp_available, partial(supports, "cpp")),
        Backend("triton", "cuda", triton_available, partial(supports, "triton"), triton),
    )
