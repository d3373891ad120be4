# SPDX-License-Identifier: Apache-2.0
"""`QuantLinear`: `torch.nn.Linear` with an integer weight."""

from typing import Self

import torch
from torch import Tensor, nn

from zo_kernels.nn._base import QuantModule
from zo_kernels.ops import qlinear


class QuantLinear(QuantModule):
    """y = (x @ qweight.T) * scale + bias, with qweight int8 [N, K] and scale fp32 [N].

    Stands where an `nn.Linear` stood. `weight` gives shape, dtype and device but no values: the
    weight exists as integers only.

    Args:
        in_features: K, size of the last dimension of the input.
        out_features: N, size of the last dimension of the output.
        bias: whether there is a bias [N].
        device: where the tensors are made.
        dtype: of the bias, and what `weight.dtype` answers; default `torch.get_default_dtype()`.

    Shapes: input floating [..., K], output [..., N] in the dtype of the input.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), bias, device, dtype)
        self.in_features = in_features
        self.out_features = out_features

    @classmethod
    def _empty(cls, source: nn.Linear, device: torch.device | str, dtype: torch.dtype) -> Self:
        has_bias = source.bias is not None
        return cls(source.in_features, source.out_features, has_bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return qlinear(x, self.qweight, self.scale, bias=self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, spec={self.spec}"
        )
