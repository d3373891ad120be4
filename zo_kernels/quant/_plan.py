# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model are quantized, and how: decided and checked before anything changes."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd

from zo_kernels.nn import QuantConv2d, QuantLinear, QuantModule, Spec
from zo_kernels.quant.config import QuantConfig

# Exact types: a subclass may compute something else in its forward.
QUANT_TYPES: dict[type[nn.Module], type[QuantModule]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
}


@dataclass(frozen=True)
class Plan:
    """What is to happen to each linear or convolution layer.

    Attributes:
        quantized: layer name -> spec.
        skipped: layer name -> why it stays as it is.
    """

    quantized: dict[str, Spec]
    skipped: dict[str, str]


def plan(model: nn.Module, config: QuantConfig, where: str) -> Plan:
    """Decide from the layers' types, names and shapes; no value is read.

    Raises:
        ValueError: a pattern matches no layer; nothing is left to quantize; a spec does not fit its
            layer; a layer carries hooks. `where` is the name that the message begins with.
    """
    candidates = dict(_candidates(model))
    _check_patterns(config, candidates, where)
    owners = _weight_owners(model)
    quantized: dict[str, Spec] = {}
    skipped: dict[str, str] = {}
    misfits: dict[str, str] = {}
    for name, layer in candidates.items():
        reason = reason_to_skip(layer)
        if reason is None and len(owners[id(layer.weight)]) > 1:
            others = sorted(owners[id(layer.weight)] - {name})
            reason = f"its weight is shared with {', '.join(others)}"
        chosen = config.spec_for(name)
        if reason is None and chosen is None:
            reason = "skipped by pattern"
        if reason is not None or chosen is None:
            skipped[name] = str(reason)
            continue
        quantized[name], misfit = _fitting(Spec.parse(chosen), config, layer)
        if misfit is not None:
            misfits[name] = misfit
    _check_misfits(misfits, where)
    if not quantized:
        raise ValueError(
            f"{where}: model must contain nn.Linear or nn.Conv2d layers to quantize, "
            f"got {_why_none(model, skipped)}; check the model and the skip patterns"
        )
    for name in quantized:
        _check_hooks(name, candidates[name], where)
    return Plan(quantized, skipped)


def reason_to_skip(layer: nn.Module) -> str | None:
    """Why no integer module can take the place of `layer`, or None."""
    if isinstance(layer, QuantModule):
        return f"quantized already ({layer.spec})"
    if type(layer) not in QUANT_TYPES:
        return f"no integer module for {type(layer).__name__}"
    if isinstance(layer, nn.Conv2d):
        return QuantConv2d.unsupported(layer)
    return None


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """First name of each module -> all names under which the model holds it."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(first.setdefault(id(module), name), []).append(name)
    return names


def replace_module(model: nn.Module, name: str, new: object) -> None:
    """Put `new` where `model` holds the submodule, parameter or buffer `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear and convolution layers inside `model`: the root has no parent that could swap it."""
    kinds = (nn.Linear, _ConvNd, QuantModule)
    return ((name, m) for name, m in model.named_modules() if name and isinstance(m, kinds))


def _check_patterns(config: QuantConfig, candidates: dict[str, nn.Module], where: str) -> None:
    for pattern in config.patterns():
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise ValueError(
                f"{where}: pattern must match a linear or convolution layer, got {pattern!r}, "
                f"which matches none of {len(candidates)}; "
                "compare it with the names that model.named_modules() gives"
            )


def _fitting(spec: Spec, config: QuantConfig, layer: nn.Module) -> tuple[Spec, str | None]:
    """The spec that the layer takes, and why that one does not fit it either, or None."""
    shape = layer.get_parameter("weight").shape
    misfit = spec.misfit(shape)
    if misfit is None or config.fallback is None:
        return spec, misfit
    spec = Spec.parse(config.fallback)
    return spec, spec.misfit(shape)


def _check_misfits(misfits: dict[str, str], where: str) -> None:
    if misfits:
        shown = "; ".join(f"{name}: {why}" for name, why in list(misfits.items())[:3])
        raise ValueError(
            f"{where}: spec must fit every layer, got {len(misfits)} that it does not fit "
            f"({shown}); give QuantConfig a fallback, overrides or skip patterns for them"
        )


def _why_none(model: nn.Module, skipped: dict[str, str]) -> str:
    if type(model) in QUANT_TYPES:
        name = type(model).__name__
        return f"a bare {name} (use Quant{name}.from_float)"
    if not skipped:
        return f"a {type(model).__name__} without any"
    reasons = sorted(set(skipped.values()))
    return f"{len(skipped)} layers that cannot or must not be ({'; '.join(reasons[:3])})"


def _check_hooks(name: str, layer: nn.Module, where: str) -> None:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    if any(hooks) or hasattr(layer, "_hf_hook"):
        raise ValueError(
            f"{where}: {name} must carry no hooks, got some that the new layer would lose; "
            f"remove them (CPU offload included) and add them after {where}"
        )


def _weight_owners(model: nn.Module) -> dict[int, set[str]]:
    """id of each parameter -> names of the distinct modules that hold it."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    return owners
