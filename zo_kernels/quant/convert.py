# SPDX-License-Identifier: Apache-2.0
"""`quantize_`: replace the linear and convolution layers of a model by integer ones, in place."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from zo_kernels.nn import QuantConv2d, QuantLinear, QuantModule
from zo_kernels.nn._base import check_weight
from zo_kernels.quant.config import QuantConfig
from zo_kernels.quant.rounding import ROUNDINGS

# Exact types: a subclass may compute something else in its forward.
QUANT_TYPES: dict[type[nn.Module], type[QuantModule]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
}
CONFIG_ATTRIBUTE = "_zo_quant_config"  # on the model, so that a saved file can tell


@dataclass(frozen=True)
class QuantReport:
    """What `quantize_` did.

    Attributes:
        quantized: layer name -> spec.
        skipped: layer name -> why it stayed as it was (linear and convolution layers only).
        bytes_before, bytes_after: parameters and buffers of the whole model.
    """

    quantized: dict[str, str]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

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
    layer changes: after an error the model is as it was.

    Layers that stay float, with the reason in the report: those that `config.skip` names,
    subclasses of Linear and Conv2d, convolutions that no op computes, and weights that are shared
    with another module. Layers that are quantized already are left as they are.

    Example:
        >>> report = quantize_(pipe.unet, QuantConfig(skip=("conv_in", "conv_out")))
        >>> print(report)

    Args:
        model: any module that contains linear or convolution layers.
        config: default `QuantConfig()`: int8, absmax, every layer.

    Raises:
        ValueError: a pattern matches no layer; nothing is left to quantize; a weight is not finite
            or on the meta device; a layer carries hooks, which would be lost.
        TypeError: a weight is not floating.
    """
    config = config or QuantConfig()
    candidates = dict(_candidates(model))
    _check_patterns(config, candidates)
    quantized, skipped = _plan(model, config, candidates)
    if not quantized:
        raise ValueError(
            "quantize_: model must contain nn.Linear or nn.Conv2d layers to quantize, "
            f"got {_why_none(model, skipped)}; check the model and the skip patterns"
        )
    for name in quantized:
        _check_layer(name, candidates[name])
    del candidates  # it holds the float layers, which must go one by one

    bytes_before = _bytes(model)
    aliases = _aliases(model)
    for name in quantized:
        layer = model.get_submodule(name)
        rounded = QUANT_TYPES[type(layer)].from_float(layer, ROUNDINGS[config.rounding])
        del layer
        for alias in aliases[name]:
            replace_module(model, alias, rounded)
    setattr(model, CONFIG_ATTRIBUTE, config)
    return QuantReport(quantized, skipped, bytes_before, _bytes(model))


def dequantize(module: QuantModule) -> Tensor:
    """A float copy of the weight of a quantized module: fp32 in the shape of the weight.

    For inspection and export; no forward pass calls it.
    """
    per_channel = module.scale.view(-1, *[1] * (module.qweight.dim() - 1))
    return module.qweight * per_channel


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `model` holds the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear and convolution layers inside `model`: the root has no parent that could swap it."""
    kinds = (nn.Linear, _ConvNd, QuantModule)
    return ((name, m) for name, m in model.named_modules() if name and isinstance(m, kinds))


def _check_patterns(config: QuantConfig, candidates: dict[str, nn.Module]) -> None:
    for pattern in config.patterns():
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise ValueError(
                f"quantize_: pattern must match a linear or convolution layer, got {pattern!r}, "
                f"which matches none of {len(candidates)}; "
                "compare it with the names that model.named_modules() gives"
            )


def _plan(
    model: nn.Module, config: QuantConfig, candidates: dict[str, nn.Module]
) -> tuple[dict[str, str], dict[str, str]]:
    """Layer names to quantize with their spec, and to skip with the reason."""
    owners = _weight_owners(model)
    quantized, skipped = {}, {}
    for name, layer in candidates.items():
        reason, spec = _reason_to_skip(layer), config.spec_for(name)
        if reason is None and len(owners[id(layer.weight)]) > 1:
            others = sorted(owners[id(layer.weight)] - {name})
            reason = f"its weight is shared with {', '.join(others)}"
        if reason is None and spec is None:
            reason = "skipped by pattern"
        if reason is None and spec is not None:
            quantized[name] = spec
        else:
            skipped[name] = str(reason)
    return quantized, skipped


def _reason_to_skip(layer: nn.Module) -> str | None:
    if isinstance(layer, QuantModule):
        return f"quantized already ({layer.spec})"
    if type(layer) not in QUANT_TYPES:
        return f"no integer module for {type(layer).__name__}"
    if isinstance(layer, nn.Conv2d):
        return QuantConv2d.unsupported(layer)
    return None


def _why_none(model: nn.Module, skipped: dict[str, str]) -> str:
    if type(model) in QUANT_TYPES:
        name = type(model).__name__
        return f"a bare {name} (use Quant{name}.from_float)"
    if not skipped:
        return f"a {type(model).__name__} without any"
    reasons = sorted(set(skipped.values()))
    return f"{len(skipped)} layers that cannot or must not be ({'; '.join(reasons[:3])})"


def _check_layer(name: str, layer: nn.Module) -> None:
    weight = layer.get_parameter("weight")
    check_weight(weight, "quantize_", f"{name}.weight")
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    if any(hooks) or hasattr(layer, "_hf_hook"):
        raise ValueError(
            f"quantize_: {name} must carry no hooks, got some that the new layer would lose; "
            "remove them (CPU offload included) and add them after quantize_"
        )


def _weight_owners(model: nn.Module) -> dict[int, set[str]]:
    """id of each parameter -> names of the distinct modules that hold it."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    return owners


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """First name of each module -> all names under which the model holds it."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(first.setdefault(id(module), name), []).append(name)
    return names


def _bytes(model: nn.Module) -> int:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
