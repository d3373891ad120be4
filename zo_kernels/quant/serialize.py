# SPDX-License-Identifier: Apache-2.0
"""A quantized model in one safetensors file.

The file holds the `state_dict` of the model: codes as I8, scales as F32, everything else as it is,
convolutions in the usual [N, C, kh, kw] order. The header's metadata has one entry, `zo_kernels`, a
JSON object (one entry, because the order of several is not reproducible):

| field | value |
|---|---|
| `version` | version of this layout, 1 |
| `layers` | layer name -> [spec, dtype of the activations] |
| `tied` | name of a tensor that shares the memory of another -> the name that is stored |
| `config` | the fields of the `QuantConfig` that made the model; null if it was made by hand |
"""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zo_kernels._files import atomic_write
from zo_kernels.nn import QuantModule
from zo_kernels.quant.config import QuantConfig
from zo_kernels.quant.convert import CONFIG_ATTRIBUTE, QUANT_TYPES, replace_module
from zo_kernels.quant.formats import check_spec

Layers = dict[str, tuple[str, torch.dtype]]
Model = TypeVar("Model", bound=nn.Module)

_VERSION = 1
_KEY = "zo_kernels"
_FIELDS = {"version", "layers", "tied", "config"}


def save_quantized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model that `quantize_` made into one safetensors file, whole or not at all.

    Args:
        model: contains quantized modules.
        path: the file to write; its folder must exist, an older file is replaced.

    Raises:
        ValueError: the model holds no quantized module.
        OSError: the file cannot be written; nothing is left behind, an older file is unchanged.
    """
    target = Path(path)
    layers = {
        name: [module.spec, _dtype_name(module.weight.dtype)]
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantModule)
    }
    if not layers:
        raise ValueError(
            f"save_quantized: model must contain quantized modules, got a {type(model).__name__} "
            "without any; call quantize_ first"
        )
    tensors, tied = _split_tied(model.state_dict())
    config: QuantConfig | None = getattr(model, CONFIG_ATTRIBUTE, None)
    header = {
        "version": _VERSION,
        "layers": layers,
        "tied": tied,
        "config": config and config.to_dict(),
    }
    try:
        with atomic_write(target) as temporary:
            save_file(tensors, temporary, {_KEY: json.dumps(header, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"save_quantized: path must be a file that can be written, got {target} ({error}); "
            "free disk space or choose another folder"
        ) from error


def load_quantized(model: Model, path: str | os.PathLike[str]) -> Model:
    """Turn a float `model` into the quantized one that `save_quantized` wrote.

    Bit for bit the saved model: every tensor takes the dtype and the bytes of the file, and is on
    the CPU afterwards. Everything is checked before the model changes.

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
        ValueError: the file is damaged, was not written by `save_quantized`, or does not fit the
            model; or a buffer that no file holds is on the meta device.
    """
    source = Path(path)
    metadata, tensors = _read(source)
    layers, tied, config = _parse_header(metadata, source)
    for name, stored in tied.items():
        tensors[name] = tensors[stored]
    _check_fit(model, layers, tensors, source)

    rounded: list[QuantModule] = []
    for name, (_, dtype) in layers.items():
        layer = model.get_submodule(name)
        kind = type(layer) if isinstance(layer, QuantModule) else QUANT_TYPES[type(layer)]
        rounded.append(kind.like(layer, "meta", dtype))
        replace_module(model, name, rounded[-1])
    model.load_state_dict(tensors, assign=True)
    for module in rounded:
        module.qweight = module.qweight.contiguous(memory_format=module.layout)
    for name, stored in tied.items():
        replace_module(model, name, _attribute(model, stored))
    setattr(model, CONFIG_ATTRIBUTE, config)
    return model


def _split_tied(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, contiguous, and for those that share memory with one of them its name."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        stored = first.setdefault(place, name) if tensor.numel() else name
        if stored == name:
            tensors[name] = tensor.contiguous()
        else:
            tied[name] = stored
    return tensors, tied


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"load_quantized: path must be a file, got {path}; save_quantized writes one"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _bad_file("be a whole safetensors file", path, str(error)) from error


def _parse_header(
    metadata: dict[str, str], path: Path
) -> tuple[Layers, dict[str, str], QuantConfig | None]:
    try:
        header = json.loads(metadata.get(_KEY, "null"))
    except json.JSONDecodeError as error:
        raise _bad_file("have a header of JSON", path, str(error)) from error
    if not isinstance(header, dict) or header.keys() != _FIELDS:
        got = f"fields {sorted(header)}" if isinstance(header, dict) else "no such header"
        raise _bad_file("have the header of save_quantized", path, got)
    if header["version"] != _VERSION:
        raise _bad_file(f"have layout version {_VERSION}", path, f"version {header['version']}")
    layers = {}
    for name, (spec, dtype) in header["layers"].items():
        check_spec(spec, f"load_quantized: {path}")
        layers[name] = (spec, getattr(torch, dtype))
    config = header["config"]
    return layers, header["tied"], None if config is None else QuantConfig.from_dict(config)


def _check_fit(model: nn.Module, layers: Layers, tensors: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError unless the file has exactly the tensors that the model will need."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in layers:
        layer = modules.get(name)
        if not isinstance(layer, QuantModule):
            if type(layer) not in QUANT_TYPES:
                raise _misfit(path, f"{name} quantized, which is {type(layer).__name__} there")
            weight = shapes.pop(f"{name}.weight")
            shapes |= {f"{name}.qweight": weight, f"{name}.scale": weight[:1]}
        for key, dtype in (("qweight", torch.int8), ("scale", torch.float32)):
            tensor = tensors.get(f"{name}.{key}")
            if tensor is not None and tensor.dtype != dtype:
                raise _misfit(path, f"{name}.{key} of {tensor.dtype} in place of {dtype}")
            if tensor is not None and key == "scale" and not bool(torch.isfinite(tensor).all()):
                raise _misfit(path, f"{name}.scale with values that are NaN or infinite")
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(shapes.keys() | stored.keys()):
        if shapes.get(name) != stored.get(name):
            raise _misfit(
                path,
                f"{name} of shape {stored.get(name, 'none')} "
                f"where the model has {shapes.get(name, 'none')}",
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in stored:
            raise ValueError(
                f"load_quantized: model must hold values for {name}, which no file stores, got a "
                "tensor on the meta device; build it with accelerate.init_empty_weights()"
            )


def _bad_file(requirement: str, path: Path, got: str) -> ValueError:
    return ValueError(
        f"load_quantized: path must {requirement}, got {path} ({got}); save the model again"
    )


def _misfit(path: Path, got: str) -> ValueError:
    return ValueError(
        f"load_quantized: model must have the architecture that {path} was saved from, got {got}; "
        "build it from the same config"
    )


def _attribute(model: nn.Module, name: str) -> Any:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
