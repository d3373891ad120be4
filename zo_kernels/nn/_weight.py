# SPDX-License-Identifier: Apache-2.0
"""What the attribute `weight` of a quantized module answers.

Model code reads `layer.weight.dtype` or `.device` to cast activations and to place new tensors. A
float tensor here would be the dequantized copy that must not exist, and the int8 codes would make
that code cast activations to int8. So `weight` describes the weight and holds no values.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch


class WeightInfo:
    """Shape, dtype and device of a weight that exists as integers only.

    `dtype` is the one that activations are expected in. Any use as a tensor raises TypeError.
    """

    __slots__ = ("_owner", "device", "dtype", "shape")

    requires_grad = False
    grad = None

    def __init__(
        self, owner: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._owner = owner
        self.shape = shape
        self.dtype = dtype
        self.device = device

    @property
    def data(self) -> "WeightInfo":
        return self

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise TypeError(_no_values("weight", getattr(func, "__name__", str(func))))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_no_values(f"{self._owner}.weight", f"weight.{name}"))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._owner}, shape={tuple(self.shape)}, "
            f"dtype={self.dtype}, device={self.device})"
        )


def _no_values(what: str, use: str) -> str:
    return (
        f"quantized module: {what} must be read for shape, dtype and device only, got {use}; "
        "use .codes() and .scale, or zo_kernels.quant.dequantize(module) for a float copy"
    )
