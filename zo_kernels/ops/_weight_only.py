# SPDX-License-Identifier: Apache-2.0
"""What `qlinear` and `qconv2d` share: checks of a stored weight, and the reference arithmetic.

The integers are multiplied as integers in the dtype of the activations and the scale comes after,
on the smaller output. That is exact in math, keeps the codes exact even in bf16, and is what the
epilogue of a fused kernel does.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_quantized(
    op: str,
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    weight_dims: Sequence[str],
) -> None:
    """Raise unless the tensors of a quantized layer fit each other; values are not read."""
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: x must be float32, bfloat16, float16 or float64, got {x.dtype}; cast it"
        )
    if qweight.dtype != torch.int8:
        raise TypeError(
            f"{op}: qweight must be int8, got {qweight.dtype}; quantize the weight first"
        )
    if qweight.dim() != len(weight_dims):
        raise ValueError(
            f"{op}: qweight must be [{', '.join(weight_dims)}], got shape {tuple(qweight.shape)}; "
            "store the codes in the shape of the weight"
        )
    vectors = {"scale": scale, "zero_point": zero_point, "bias": bias}
    dtypes = {"scale": (torch.float32,), "zero_point": (torch.int8,), "bias": FLOATS}
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != qweight.shape[:1]:
            raise ValueError(
                f"{op}: {name} must be [{qweight.shape[0]}], one value per output channel, "
                f"got shape {tuple(vector.shape)}; check which layer it belongs to"
            )
        if vector.dtype not in dtypes[name]:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes[name])
            raise TypeError(f"{op}: {name} must be {wanted}, got {vector.dtype}; cast it")
    for name, tensor in {"qweight": qweight, **vectors}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the device of x ({x.device}), got {tensor.device}; "
                "move the module or the input"
            )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the product: float16 overflows at 65504, which unscaled sums do reach."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def codes(qweight: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """qweight - zero_point as `dtype`: integers up to 255, exact in bf16. Lives for one call."""
    values = qweight.to(dtype)
    if zero_point is not None:
        values -= zero_point.to(dtype).view(-1, *[1] * (qweight.dim() - 1))
    return values


def epilogue(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y * scale + bias in fp32 (or wider), one rounding, in place on the fresh y."""
    return y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale, out=y)


def outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function` as if autocast were off: the dtype of x decides, as the schema says.

    Autocast would reach the matmul inside a reference and run unscaled sums in float16.
    """

    @wraps(function)
    def wrapper(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapper


def refuse_scale_grad(op: str, scale: Tensor) -> None:
    if scale.requires_grad:
        raise NotImplementedError(
            f"{op}: scale must not require a gradient, got one that does; "
            "detach it, or estimate its gradient by forward passes"
        )
