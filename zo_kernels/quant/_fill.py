# SPDX-License-Identifier: Apache-2.0
"""Fill a model from stored tensors, layer by layer: integers into quantized modules, the rest as it
is. Checks come first, so that a model that does not fit is not touched."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels.nn import QuantModule, Spec
from zo_kernels.nn._base import INTEGERS
from zo_kernels.nn._check import check_scale
from zo_kernels.quant._plan import QUANT_TYPES, aliases, replace_module
from zo_kernels.quant._safetensors import Entry

Refuse = Callable[[str], ValueError]  # what is wrong -> the error


@dataclass(frozen=True)
class Integers:
    """The stored weight of one layer.

    Attributes:
        spec: how it is stored and multiplied.
        shape: of the weight.
        codes: makes int8 codes in that shape.
        scale: makes fp32 [N] or [N, K / group].
        zero_point: makes int8 of the shape of scale; None where symmetric.
        dtype: that activations are expected in; None: that of the layer in the model.
        in_scale: makes fp32 [inputs]; None where there is none.
    """

    spec: Spec
    shape: tuple[int, ...]
    codes: Callable[[], Tensor]
    scale: Callable[[], Tensor]
    zero_point: Callable[[], Tensor] | None = None
    dtype: torch.dtype | None = None
    in_scale: Callable[[], Tensor] | None = None


def check_fit(
    model: nn.Module,
    layers: Mapping[str, Integers],
    rest: Mapping[str, Entry],
    where: str,
    refuse: Refuse,
) -> None:
    """Raise unless `layers` and `rest` are exactly what the model needs.

    Args:
        layers: layer name -> its integers, under any of the names that the model has for it.
        rest: name in the state dict -> tensor, for all the rest; tied names may be left out.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    needed = {name: tuple(t.shape) for name, t in _state(model).items()}
    for name, integers in layers.items():
        shape = weight_shape(modules, name, refuse)
        if shape != integers.shape:
            raise refuse(f"{name} with a weight of {integers.shape} where the model has {shape}")
        if (misfit := integers.spec.misfit(shape)) is not None:
            raise refuse(f"{name} as {integers.spec}, where {misfit}")
        check_scale(where, f"{name}.scale", integers.scale())
        if integers.in_scale is not None:
            check_scale(where, f"{name}.in_scale", integers.in_scale())
    for name, module in modules.items():
        if name in layers:
            needed.pop(f"{name}.weight", None)
        elif isinstance(module, QuantModule):
            raise refuse(f"{name} in float or not at all where the model has integers")
    stored = {name: entry.shape for name, entry in rest.items()}
    same = tied_names(model)
    for name in sorted(needed.keys() | stored.keys()):
        if name not in stored and any(other in stored for other in same.get(name, ())):
            continue
        if needed.get(name) != stored.get(name):
            raise refuse(
                f"{name} of shape {stored.get(name, 'none')} "
                f"where the model has {needed.get(name, 'none')}"
            )
    for name, buffer in model.named_buffers():
        integer = isinstance(modules[name.rpartition(".")[0]], QuantModule)
        if buffer.is_meta and name not in stored and not integer:
            raise ValueError(
                f"{where}: model must hold values for {name}, which no file stores, got a "
                "tensor on the meta device; build it with accelerate.init_empty_weights()"
            )


def weight_shape(modules: Mapping[str, nn.Module], name: str, refuse: Refuse) -> tuple[int, ...]:
    """Shape of the weight of a layer that integers can take the place of."""
    layer: Any = modules.get(name)
    if not isinstance(layer, QuantModule) and type(layer) not in QUANT_TYPES:
        raise refuse(f"{name} quantized, which is {type(layer).__name__} there")
    return tuple(layer.weight.shape)


def inputs_of(layer: Any) -> int:
    """Channels of the input of a linear or convolution layer, floating or quantized."""
    size: int = layer.in_features if hasattr(layer, "in_features") else layer.in_channels
    return size


def fill_layers_(model: nn.Module, layers: Mapping[str, Integers]) -> None:
    """Put a quantized module in the place of each layer; it has the float bias of that layer."""
    for names in aliases(model).values():
        name = next((name for name in names if name in layers), None)
        if name is None:
            continue
        layer: Any = model.get_submodule(name)
        kind = type(layer) if isinstance(layer, QuantModule) else QUANT_TYPES[type(layer)]
        stored = layers[name]
        module = kind.like(layer, "meta", stored.dtype, stored.spec)
        zero_point = None if stored.zero_point is None else stored.zero_point().clone()
        module.set_codes(stored.codes(), stored.scale().clone(), zero_point)
        if stored.in_scale is not None:
            module.in_scale = stored.in_scale().clone()
        module.bias = layer.bias
        for alias in names:
            replace_module(model, alias, module)


def fill_rest_(
    model: nn.Module, rest: Mapping[str, Entry], tied: Mapping[str, str], cast: bool
) -> None:
    """Give the model every parameter and buffer that is not an integer of a quantized module.

    Args:
        rest: name in the state dict -> tensor; a tied one may stand under any of its names.
        tied: name -> name of the tensor that it shall share, beside what the model shares already.
        cast: whether a tensor takes the dtype that the model has, or keeps its own.
    """
    same = tied_names(model)
    shared = {name: min(name, *others) for name, others in same.items()}
    assigned: dict[str, Tensor] = {}
    for name, mine in _state(model).items():
        source = next((n for n in (name, *same.get(name, ())) if n in rest), None)
        if source is None or name in tied or shared.get(name, name) != name:
            continue
        values = rest[source].make()
        # What a file maps is copied, or the mapping would live as long as the model.
        assigned[name] = values.to(mine.dtype if cast else values.dtype, copy=True)
    model.load_state_dict(assigned, strict=False, assign=True)
    for name, first in {**shared, **tied}.items():
        if name != first:
            replace_module(model, name, _attribute(model, first))


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name of each parameter or buffer that the model holds under several -> the other names."""
    groups: dict[int, list[str]] = {}
    for name, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        groups.setdefault(id(tensor), []).append(name)
    return {
        name: tuple(other for other in names if other != name)
        for names in groups.values()
        if len(names) > 1
        for name in names
    }


def entry_of(tensor: Tensor) -> Entry:
    """A tensor in memory as if it were in a file."""
    return Entry(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def integer_names(model: nn.Module) -> set[str]:
    """Names in the state dict that belong to quantized modules, but for the bias."""
    return {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantModule)
        for key in (*INTEGERS, "_extra_state")
    }


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the integers of quantized modules."""
    leave = integer_names(model)
    return {k: v for k, v in model.state_dict().items() if k not in leave}


def _attribute(model: nn.Module, name: str) -> Any:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)
