# SPDX-License-Identifier: Apache-2.0
"""A quantized model in one safetensors file.

Of each quantized layer the file holds `<layer>.codes` (logical codes, as `zo_kernels.quant.formats`
lays them out), `<layer>.scale` and, where there is one, `<layer>.zero_point` and
`<layer>.in_scale`; everything else as the model's `state_dict` has it. No layout of a kernel is
stored: the file serves every version of it. The header's metadata has one entry, `zo_kernels`, a
JSON object (one entry, because the order of several is not reproducible):

| field | value |
|---|---|
| `version` | version of this layout: 3 where a layer has an `in_scale`, else 2 |
| `layers` | layer name -> [spec, dtype of the activations] |
| `tied` | name of a tensor that shares the memory of another -> the name that is stored |
| `config` | the fields of the `QuantConfig` that made the model; null if it was made by hand |

Version 1 is read too: it has w8 only, and `<layer>.qweight` for the codes.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from zo_kernels._files import atomic_write
from zo_kernels.nn import QuantModule, Spec
from zo_kernels.quant._fill import (
    Integers,
    check_fit,
    entry_of,
    fill_layers_,
    fill_rest_,
    inputs_of,
    integer_names,
    weight_shape,
)
from zo_kernels.quant._safetensors import Entry, TensorFiles, bad_file, write
from zo_kernels.quant.config import QuantConfig
from zo_kernels.quant.convert import CONFIG_ATTRIBUTE
from zo_kernels.quant.formats import from_stored, stored_form, to_stored

Model = TypeVar("Model", bound=nn.Module)

_PLAIN, _WITH_IN_SCALE = 2, 3
_CODES = {1: "qweight", 2: "codes", 3: "codes"}  # version -> how the codes are called
_KEY = "zo_kernels"
_FIELDS = {"version", "layers", "tied", "config"}


def save_quantized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model that `quantize_` made into one safetensors file, whole or not at all.

    Layer by layer: no second copy of the model is made.

    Args:
        model: contains quantized modules.
        path: the file to write; its folder must exist, an older file is replaced.

    Raises:
        ValueError: the model holds no quantized module, or is one.
        OSError: the file cannot be written; nothing is left behind, an older file is unchanged.
    """
    target = Path(path)
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantModule)
    }
    if not layers or "" in layers:
        which = "that is one: put it into a container" if layers else "without any: quantize it"
        raise ValueError(
            "save_quantized: model must contain quantized modules, got a "
            f"{type(model).__name__} {which} first"
        )
    entries, tied = _entries(model, layers)
    config: QuantConfig | None = getattr(model, CONFIG_ATTRIBUTE, None)
    has_in_scale = any(module.in_scale is not None for module in layers.values())
    header = {
        "version": _WITH_IN_SCALE if has_in_scale else _PLAIN,
        "layers": {
            name: [str(module.spec), _dtype_name(module.weight.dtype)]
            for name, module in layers.items()
        },
        "tied": tied,
        "config": config and config.to_dict(),
    }
    try:
        with atomic_write(target) as temporary, temporary.open("wb") as file:
            write(file, entries, {_KEY: json.dumps(header, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"save_quantized: path must be a file that can be written, got {target} ({error}); "
            "free disk space or choose another folder"
        ) from error


def load_quantized(model: Model, path: str | os.PathLike[str]) -> Model:
    """Turn a float `model` into the quantized one that `save_quantized` wrote.

    Bit for bit the saved model: every tensor takes the dtype and the bytes of the file, and is on
    the CPU afterwards. Everything is checked before the model changes; then layers are read and
    packed one by one.

    Example:
        >>> with accelerate.init_empty_weights():
        ...     unet = UNet2DConditionModel.from_config(config)
        >>> unet = load_quantized(unet, "unet.safetensors")

    Args:
        model: the architecture of the saved model; its parameters may be on the meta device, and
            should be where memory counts.
        path: file that `save_quantized` wrote.

    Returns:
        `model` itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, was not written by `save_quantized`, is of a newer version,
            or does not fit the model; or a buffer that no file holds is on the meta device.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(
            f"load_quantized: path must be a file, got {path}; save_quantized writes one"
        )
    files = TensorFiles(source, "load_quantized")
    header = _parse_header(files.metadata, source)
    rest = dict(files)
    layers = _take_layers(model, rest, header, source)
    tied = {k: v for k, v in header["tied"].items() if v in rest}
    for name, stored in tied.items():
        rest[name] = rest[stored]
    check_fit(model, layers, rest, "load_quantized", lambda got: _misfit(source, got))
    fill_layers_(model, layers)
    fill_rest_(model, rest, tied, cast=False)
    setattr(model, CONFIG_ATTRIBUTE, header["config"])
    return model


def _entries(
    model: nn.Module, layers: dict[str, QuantModule]
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors to store, and for those that share memory with one of them its name."""
    entries: dict[str, Entry] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, module in layers.items():
        for key, entry in _integer_entries(module).items():
            full = f"{name}.{key}"
            stored = first.setdefault((id(module), key), full)
            if stored == full:
                entries[full] = entry
            else:
                tied[full] = stored
    leave = integer_names(model)
    for name, tensor in model.state_dict().items():
        if name in leave:
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        stored = first.setdefault(place, name) if tensor.numel() else name
        if stored == name:
            entries[name] = entry_of(tensor)
        else:
            tied[name] = stored
    return entries, tied


def _integer_entries(module: QuantModule) -> dict[str, Entry]:
    bits = module.spec.bits
    dtype, shape = stored_form(module.weight.shape, bits)
    entries = {
        "codes": Entry(dtype, shape, lambda: to_stored(module.codes(), bits)),
        "scale": entry_of(module.scale.detach()),
    }
    if module.zero_point is not None:
        entries["zero_point"] = entry_of(module.zero_point)
    if module.in_scale is not None:
        entries["in_scale"] = entry_of(module.in_scale.detach())
    return entries


def _parse_header(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    try:
        header = json.loads(metadata.get(_KEY, "null"))
    except json.JSONDecodeError as error:
        raise _bad_file("have a header of JSON", path, str(error)) from error
    if not isinstance(header, dict) or "version" not in header:
        raise _bad_file("have the header of save_quantized", path, "no such header")
    if header["version"] not in _CODES:
        known = " or ".join(map(str, _CODES))
        raise ValueError(
            f"load_quantized: path must have layout version {known}, got {path} "
            f"(version {header['version']}); a newer zo_kernels wrote it: update this one"
        )
    if header.keys() != _FIELDS:
        raise _bad_file("have the header of save_quantized", path, f"fields {sorted(header)}")
    config = header["config"]
    header["config"] = None if config is None else QuantConfig.from_dict(config)
    return header


def _take_layers(
    model: nn.Module, rest: dict[str, Entry], header: dict[str, Any], path: Path
) -> dict[str, Integers]:
    """The layers of the file; their tensors are taken out of `rest`."""
    stored = dict(rest)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {}
    for name, (text, dtype) in header["layers"].items():
        spec = Spec.parse(text, f"load_quantized: {path}")
        shape = weight_shape(modules, name, lambda got: _misfit(path, got))
        scales = spec.scale_shape(shape)
        wanted = {
            _CODES[header["version"]]: stored_form(shape, spec.bits),
            "scale": (torch.float32, scales),
        }
        if spec.asymmetric:
            wanted["zero_point"] = (torch.int8, scales)
        in_scale = f"{name}.in_scale"
        if header["tied"].get(in_scale, in_scale) in stored:
            wanted["in_scale"] = (torch.float32, (inputs_of(modules[name]),))
        made = {}
        for key, form in wanted.items():
            full = f"{name}.{key}"
            entry = stored.get(header["tied"].get(full, full))
            _check_form(full, entry, form, path)
            assert entry is not None
            made[key] = entry.make
            rest.pop(full, None)
        codes = made.pop(_CODES[header["version"]])
        logical = partial(_logical, codes, shape, spec.bits)
        layers[name] = Integers(spec, shape, logical, dtype=getattr(torch, dtype), **made)
    return layers


def _logical(codes: Callable[[], Tensor], shape: tuple[int, ...], bits: int) -> Tensor:
    return from_stored(codes(), shape, bits)


def _check_form(name: str, entry: Entry | None, form: tuple[Any, Any], path: Path) -> None:
    dtype, shape = form
    if entry is None or entry.shape != shape:
        got = "none" if entry is None else entry.shape
        raise _misfit(path, f"{name} of shape {got} where the model has {shape}")
    if entry.dtype != dtype:
        raise _misfit(path, f"{name} of {entry.dtype} in place of {dtype}")


def _bad_file(requirement: str, path: Path, got: str) -> ValueError:
    return bad_file("load_quantized", requirement, path, got)


def _misfit(path: Path, got: str) -> ValueError:
    return ValueError(
        f"load_quantized: model must have the architecture that {path} was saved from, got {got}; "
        "build it from the same config"
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
