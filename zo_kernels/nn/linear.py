# SPDX-License-Identifier: Apache-2.0
"""`QuantLinear`: `torch.nn.Linear` with an integer weight."""

from typing import Self

import torch
from torch import Tensor, nn

from zo_kernels.nn._base import QuantModule
from zo_kernels.nn._spec import Spec
from zo_kernels.ops import qlinear


class QuantLinear(QuantModule):
    """y = x @ W.T + bias with W = scale * (codes - zero_point) [N, K], as `zo_kernels.ops.qlinear`
    computes it: W exists as integers only.

    Stands where an `nn.Linear` stood. `weight` gives shape, dtype and device but no values.

    Args:
        in_features: K, size of the last dimension of the input.
        out_features: N, size of the last dimension of the output.
        bias: whether there is a bias [N].
        device: where the tensors are made.
        dtype: of the bias, and what `weight.dtype` answers; default `torch.get_default_dtype()`.
        spec: how the weight is stored and multiplied; see `Spec`.

    Raises:
        ValueError: there is no such spec, or it does not fit [N, K].

    Shapes: input floating [..., K], output [..., N] in the dtype of the input.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        spec: Spec | str = "w8",
    ) -> None:
        super().__init__((out_features, in_features), bias, device, dtype, spec)
        self.in_features = in_features
        self.out_features = out_features

    @property
    def inputs(self) -> int:
        return self.in_features

    @classmethod
    def _empty(
        cls, source: nn.Linear, device: torch.device | str, dtype: torch.dtype, spec: Spec
    ) -> Self:
        has_bias = source.bias is not None
        return cls(source.in_features, source.out_features, has_bias, device, dtype, spec)

    def forward(
        self,
        x: Tensor,
        *,
        x_scale: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """What stands behind `x` is for callers that know this module: int8 activations with their
        scale [...], what is added to the output, and its dtype; see `zo_kernels.ops.qlinear`."""
        qweight, scale, zero_point, in_scale, bias = self._stored()
        if self.in_scales is not None:
            x, in_scale = self._factored(x, self.in_scales, per_sample=False)
        return qlinear(
            x,
            qweight,
            scale,
            zero_point,
            bias,
            bits=self.spec.bits,
            act_bits=self.spec.act_bits,
            x_scale=x_scale,
            in_scale=in_scale,
            residual=residual,
            out_dtype=out_dtype,
            **self.perturbation,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, spec={self.spec}"
        )
