# SPDX-License-Identifier: Apache-2.0
"""`quantize_`: replace the linear and convolution layers of a model by integer ones, in place."""

from dataclasses import dataclass

from torch import Tensor, nn

from zo_kernels.nn import QuantModule
from zo_kernels.nn._check import check_weight
from zo_kernels.quant._plan import QUANT_TYPES, Plan, aliases, plan, replace_module
from zo_kernels.quant.config import QuantConfig
from zo_kernels.quant.rounding import ROUNDINGS

CONFIG_ATTRIBUTE = "_zo_quant_config"  # on the model, so that a saved file can tell


@dataclass(frozen=True)
class QuantReport:
    """What became of the linear and convolution layers of a model.

    Attributes:
        quantized: layer name -> spec.
        skipped: layer name -> why it stayed as it was.
        bytes_before, bytes_after: parameters and buffers of the whole model.
    """

    quantized: dict[str, str]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    @classmethod
    def of(cls, done: Plan, bytes_before: int, model: nn.Module) -> "QuantReport":
        quantized = {name: str(spec) for name, spec in done.quantized.items()}
        return cls(quantized, done.skipped, bytes_before, model_bytes(model))

    def __str__(self) -> str:
        head = (
            f"{len(self.quantized)} layers quantized, {len(self.skipped)} skipped, "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
        )
        return "\n".join([head, *(f"  {name}: {why}" for name, why in self.skipped.items())])


def quantize_(model: nn.Module, config: QuantConfig | None = None) -> QuantReport:
    """Round every `nn.Linear` and `nn.Conv2d` of `model` to integers, in place, layer by layer.

    Each float weight is released before the next layer is rounded, so that the extra memory is that
    of one layer. Embeddings, norms and biases are untouched. Everything is checked before the first
    layer changes: after an error the model is as it was. A checkpoint that need not be in memory as
    a float model is read by `quantize_checkpoint`.

    Layers that stay float, with the reason in the report: those that `config.skip` names,
    subclasses of Linear and Conv2d, convolutions that no op computes, and weights that are shared
    with another module. Layers that are quantized already are left as they are.

    Example:
        >>> config = QuantConfig("w4a8-g64", skip=("conv_in", "conv_out"), fallback="w8a8")
        >>> print(quantize_(pipe.unet, config))

    Args:
        model: any module that contains linear or convolution layers.
        config: default `QuantConfig()`: weight-only int8, absmax, every layer.

    Raises:
        ValueError: a pattern matches no layer; nothing is left to quantize; a spec does not fit its
            layer; a weight is not finite or on the meta device; a layer carries hooks, which would
            be lost.
        TypeError: a weight is not floating.
    """
    config = config or QuantConfig()
    work = plan(model, config, "quantize_")
    for name in work.quantized:
        weight = model.get_submodule(name).get_parameter("weight")
        check_weight(weight, "quantize_", f"{name}.weight")
        del weight
    bytes_before = model_bytes(model)
    names = aliases(model)
    for name in work.quantized:
        quantize_layer_(model, name, names[name], work, config)
    setattr(model, CONFIG_ATTRIBUTE, config)
    return QuantReport.of(work, bytes_before, model)


def quantize_empty_(model: nn.Module, config: QuantConfig | None = None) -> QuantReport:
    """What `quantize_` makes of a model, without values: integer modules on the meta device.

    For planning: `QuantReport.bytes_after`, or a run on shapes alone.

    Args:
        model: its linear and convolution layers on the meta device.
        config: default `QuantConfig()`.

    Raises:
        ValueError: what `quantize_` refuses but for values; a layer is on another device, where its
            weight would be lost.
    """
    config = config or QuantConfig()
    work = plan(model, config, "quantize_empty_")
    for name in work.quantized:
        weight = model.get_submodule(name).get_parameter("weight")
        if not weight.is_meta:
            raise ValueError(
                f"quantize_empty_: {name}.weight must be on the meta device, got "
                f"{weight.device}; use quantize_, or build the model within torch.device('meta')"
            )
    bytes_before = model_bytes(model)
    names = aliases(model)
    for name, spec in work.quantized.items():
        layer = model.get_submodule(name)
        empty = QUANT_TYPES[type(layer)].like(layer, "meta", spec=spec)
        for alias in names[name]:
            replace_module(model, alias, empty)
    setattr(model, CONFIG_ATTRIBUTE, config)
    return QuantReport.of(work, bytes_before, model)


def quantize_layer_(
    model: nn.Module, name: str, names: list[str], work: Plan, config: QuantConfig
) -> None:
    """Round one layer, and put the integer module under all its names."""
    layer = model.get_submodule(name)
    kind, rounding = QUANT_TYPES[type(layer)], ROUNDINGS[config.rounding]
    rounded = kind.from_float(layer, rounding, work.quantized[name], config.headroom)
    for alias in names:
        replace_module(model, alias, rounded)


def dequantize(module: QuantModule) -> Tensor:
    """A float copy of the weight of a quantized module: fp32 in the shape of the weight.

    For inspection and export; no forward pass calls it.
    """
    return module.dequantized()


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
