# SPDX-License-Identifier: Apache-2.0
"""`QuantConv2d`: `torch.nn.Conv2d` with an integer weight."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from zo_kernels.nn._base import QuantModule
from zo_kernels.nn._spec import Spec
from zo_kernels.ops import qconv2d

Pair = tuple[int, int]


class QuantConv2d(QuantModule):
    """y = conv2d(x, W) + bias with W = scale * (codes - zero_point) [N, C / groups, kh, kw], as
    `zo_kernels.ops.qconv2d` computes it: W exists as integers only. Padding is with zeros.

    Stands where an `nn.Conv2d` stood. `weight` gives shape, dtype and device but no values.

    Args:
        in_channels: C of the input.
        out_channels: N of the output.
        kernel_size: int or (kh, kw).
        stride, padding, dilation: int or a pair (vertical, horizontal), in pixels.
        groups: number of independent groups of channels.
        bias: whether there is a bias [N].
        device: where the tensors are made.
        dtype: of the bias, and what `weight.dtype` answers; default `torch.get_default_dtype()`.
        spec: how the weight is stored and multiplied; see `Spec`.

    Raises:
        ValueError: groups does not divide in_channels; there is no such spec, or it does not fit
            the weight.

    Shapes: input floating [B, C, H, W], output [B, N, H', W'] in the dtype of the input.
    """

    padding_mode = "zeros"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        spec: Spec | str = "w8",
    ) -> None:
        if groups < 1 or in_channels % groups:
            raise ValueError(
                f"QuantConv2d: groups must divide in_channels ({in_channels}), got {groups}; "
                "copy both from the float layer"
            )
        kernel = _pair(kernel_size)
        super().__init__((out_channels, in_channels // groups, *kernel), bias, device, dtype, spec)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups

    @property
    def inputs(self) -> int:
        return self.in_channels

    @classmethod
    def _empty(
        cls, source: nn.Conv2d, device: torch.device | str, dtype: torch.dtype, spec: Spec
    ) -> Self:
        reason = cls.unsupported(source)
        if reason is not None:
            raise ValueError(
                f"{cls.__name__}.like: source must be a convolution that qconv2d computes, "
                f"got one whose {reason}; leave this layer in float"
            )
        return cls(
            source.in_channels,
            source.out_channels,
            source.kernel_size,
            source.stride,
            _int_padding(source),
            source.dilation,
            source.groups,
            source.bias is not None,
            device,
            dtype,
            spec,
        )

    @staticmethod
    def unsupported(conv: nn.Conv2d) -> str | None:
        """Why `conv` cannot be a `QuantConv2d`, or `None`."""
        if conv.padding_mode != "zeros":
            return f"padding_mode is {conv.padding_mode!r}"
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.padding == "same" and any(span % 2 for span in spans):
            return "padding 'same' is not symmetric for its kernel size"
        return None

    def forward(
        self,
        x: Tensor,
        *,
        x_scale: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """What stands behind `x` is for callers that know this module: int8 activations with their
        scale [B], what is added to the output, and its dtype; see `zo_kernels.ops.qconv2d`."""
        qweight, scale, zero_point, in_scale, bias = self._stored()
        if self.in_scales is not None:
            x, in_scale = self._factored(x, self.in_scales, per_sample=True)
        return qconv2d(
            x,
            qweight,
            scale,
            zero_point,
            bias,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
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
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, spec={self.spec}"
        )


def _pair(value: int | Sequence[int]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _int_padding(conv: nn.Conv2d) -> Pair:
    """The padding of `conv` in pixels, where "same" or "valid" may stand."""
    if not isinstance(conv.padding, str):
        return _pair(conv.padding)
    if conv.padding == "valid":
        return (0, 0)
    (kh, kw), (dh, dw) = conv.kernel_size, conv.dilation
    return (dh * (kh - 1) // 2, dw * (kw - 1) // 2)
