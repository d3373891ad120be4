# SPDX-License-Identifier: Apache-2.0
"""What `QuantLinear` and `QuantConv2d` share: storage of the integers and how they move."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from zo_kernels.nn._weight import WeightInfo

Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]


class QuantModule(nn.Module):
    """Codes int8 [N, ...], scale fp32 [N] and an optional bias [N].

    Codes and scale are buffers, and keep their dtype under `.to(dtype)`, `.half()` and the like:
    the integers are the model, and a scale rounded to 16 bits would shift a whole channel. The bias
    stays the parameter that it was, and follows the dtype. Moves between devices move everything.
    """

    spec = "w8"
    layout = torch.contiguous_format  # memory format of the codes

    qweight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self._dtype = dtype or torch.get_default_dtype()
        codes = torch.zeros(shape, dtype=torch.int8, device=device)
        self.register_buffer("qweight", codes.contiguous(memory_format=self.layout))
        self.register_buffer("scale", torch.ones(shape[0], dtype=torch.float32, device=device))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.zeros(shape[0], dtype=self._dtype, device=device)) if bias else None,
        )

    @property
    def weight(self) -> WeightInfo:
        """Shape, dtype and device of the weight, without values; see `WeightInfo`."""
        return WeightInfo(type(self).__name__, self.qweight.shape, self._dtype, self.qweight.device)

    @classmethod
    def _empty(cls, source: Any, device: torch.device | str, dtype: torch.dtype) -> Self:
        """A module with the shape of `source`; each subclass makes its own."""
        raise NotImplementedError

    @classmethod
    def like(
        cls,
        source: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """An empty module to load a state into.

        Args:
            source: the layer whose place it takes: a float one, or one of this class.
            device, dtype: default those of `source`.

        Raises:
            ValueError: no op computes this layer.
        """
        weight = source.weight
        module = cls._empty(source, device or weight.device, dtype or weight.dtype)
        if module.bias is not None:
            module.bias.requires_grad_(source.bias.requires_grad)
        return module.train(source.training)

    @classmethod
    def from_float(cls, source: Any, rounding: Rounding) -> Self:
        """Round the weight of `source`, which is left as it is; the bias is shared with it.

        Args:
            source: `nn.Linear` or `nn.Conv2d`, as the class says; its weight must be finite.
            rounding: weight -> (codes, scale), such as `zo_kernels.quant.absmax`.

        Raises:
            TypeError: the weight is not a floating tensor.
            ValueError: the weight is not finite or on the meta device; or no op computes this
                layer.
        """
        check_weight(source.weight, f"{cls.__name__}.from_float", "weight")
        module = cls.like(source, device="meta")
        codes, module.scale = rounding(source.weight)
        module.qweight = codes.contiguous(memory_format=cls.layout)
        module.bias = source.bias
        return module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {"qweight": self.qweight, "scale": self.scale}
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=kept["scale"].device)).dtype
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


def check_weight(weight: object, where: str, name: str) -> None:
    """Raise unless `weight` has values that can be rounded to integers."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"{where}: {name} must be a floating tensor, got {got}; "
            "the layer may be quantized already"
        )
    if weight.is_meta:
        raise ValueError(
            f"{where}: {name} must have values, got a tensor on the meta device; "
            "load the model before you quantize it"
        )
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise ValueError(
            f"{where}: {name} must be finite, got {bad} values that are NaN or infinite; "
            "repair the checkpoint, or skip this layer"
        )
