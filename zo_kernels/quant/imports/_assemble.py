# SPDX-License-Identifier: Apache-2.0
"""What the importers share: from named tensors of integers and floats to a quantized model."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from zo_kernels.nn import Spec
from zo_kernels.nn._korder import dequantized
from zo_kernels.quant._fill import (
    Integers,
    check_fit,
    entry_of,
    fill_layers_,
    fill_rest_,
    tied_names,
)
from zo_kernels.quant._plan import Plan, reason_to_skip
from zo_kernels.quant._safetensors import Entry, TensorFiles
from zo_kernels.quant.convert import CONFIG_ATTRIBUTE, QuantReport, model_bytes

Source = Mapping[str, Tensor] | str | os.PathLike[str]


def entries_of(source: Source, where: str) -> Mapping[str, Entry]:
    """The tensors of a state dict, or of safetensors files, which are read when they are used."""
    if isinstance(source, Mapping):
        return {name: entry_of(tensor) for name, tensor in source.items()}
    return TensorFiles(source, where)


def assemble_(
    model: nn.Module,
    integers: Mapping[str, Integers],
    rest: Mapping[str, Entry],
    act_bits: int | None,
    where: str,
    floats: Mapping[str, tuple[Entry, str]] | None = None,
) -> QuantReport:
    """Fill `model`, in place, layer by layer.

    A weight of integers becomes a quantized module where it belongs to a linear or convolution
    layer that can be one; anywhere else (an embedding, a shared weight) it becomes the floats that
    it stands for, and the report tells why.

    Args:
        integers, rest: by name in the model's state dict.
        act_bits: 8 or 16 for every layer; None: as `integers` say.
        floats: what is quantized in the source but must become floats, and why.

    Raises:
        ValueError: names or shapes are not those of the model.
    """
    if act_bits not in (None, 8, 16):
        raise ValueError(
            f"{where}: act_bits must be 16, 8 or None, got {act_bits!r}; choose one of these"
        )
    modules = dict(model.named_modules())
    shared = tied_names(model)
    layers: dict[str, Integers] = {}
    skipped: dict[str, str] = {}
    rest = dict(rest)
    for name, (entry, why) in (floats or {}).items():
        rest[name] = entry
        skipped[name.removesuffix(".weight")] = why
    for name, stored in integers.items():
        if act_bits is not None:
            stored = replace(stored, spec=replace(stored.spec, act_bits=act_bits))
        owner, _, leaf = name.rpartition(".")
        reason = _reason(modules.get(owner), leaf, stored, shared.get(name, ()))
        if reason is None:
            layers[owner] = stored
        else:
            skipped[name.removesuffix(".weight")] = reason
            rest[name] = Entry(torch.float32, stored.shape, _floats(stored))
    if not layers:
        raise ValueError(
            f"{where}: source must hold integer weights of the model's layers, got {len(integers)} "
            "that are none; check the names, and that the source was quantized to 8 bits"
        )
    check_fit(model, layers, rest, where, lambda got: _misfit(where, got))
    bytes_before = model_bytes(model)
    fill_layers_(model, layers)
    fill_rest_(model, rest, {}, cast=True)
    setattr(model, CONFIG_ATTRIBUTE, None)
    done = Plan({name: stored.spec for name, stored in layers.items()}, skipped)
    return QuantReport.of(done, bytes_before, model)


def _reason(
    layer: nn.Module | None, leaf: str, stored: Integers, shared: tuple[str, ...]
) -> str | None:
    """Why a weight must become floats, or None."""
    if layer is None or leaf != "weight":
        return "no linear or convolution layer of that name"
    if shared:
        return f"its weight is shared with {', '.join(shared)}"
    return reason_to_skip(layer) or stored.spec.misfit(stored.shape)


def _floats(stored: Integers) -> Callable[[], Tensor]:
    def make() -> Tensor:
        zero_point = None if stored.zero_point is None else stored.zero_point()
        return dequantized(stored.codes(), stored.scale(), zero_point)

    return make


def per_channel(scale: Tensor, spec: Spec, shape: tuple[int, ...]) -> Tensor:
    """A scale or zero point of the source, one for all or one per row or group, as modules hold it.

    Args:
        scale: 1 element, N, or N * K / group of them in the order of K.
    """
    wanted = spec.scale_shape(shape)
    flat = scale.detach().reshape(-1)
    return flat.expand(wanted).clone() if flat.numel() == 1 else flat.reshape(wanted)


def _misfit(where: str, got: str) -> ValueError:
    return ValueError(
        f"{where}: model must have the architecture that the source was made from, got {got}; "
        "build it from the same config, in float"
    )
