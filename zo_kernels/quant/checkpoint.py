# SPDX-License-Identifier: Apache-2.0
"""`quantize_checkpoint`: from a float checkpoint on disk to a quantized model, layer by layer."""

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from zo_kernels.nn._check import check_weight
from zo_kernels.quant._fill import check_fit, fill_rest_
from zo_kernels.quant._plan import aliases, plan
from zo_kernels.quant._safetensors import TensorFiles
from zo_kernels.quant.config import QuantConfig
from zo_kernels.quant.convert import CONFIG_ATTRIBUTE, QuantReport, model_bytes, quantize_layer_

_WHERE = "quantize_checkpoint"


def quantize_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    config: QuantConfig | None = None,
    *,
    ignore: Sequence[str] = (),
) -> QuantReport:
    """Load a safetensors checkpoint into `model` and round it on the way.

    What `model.load_state_dict` and `quantize_` would give together, bit for bit, but a float
    weight is read when its layer's turn comes, rounded and released: beside the quantized model
    there is one float layer in memory. Types, names and shapes are checked before anything changes;
    a weight that is not finite is found when it is read, and leaves a model to build anew.

    Example:
        >>> with accelerate.init_empty_weights():
        ...     unet = UNet2DConditionModel.from_config(folder)
        >>> print(quantize_checkpoint(unet, folder, QuantConfig("w8a8")))

    Args:
        model: the architecture of the checkpoint, its parameters on the meta device. Tensors take
            the dtypes that it has, as `load_state_dict` does; they are on the CPU afterwards.
        path: a `.safetensors` file, an index of several (`*.safetensors.index.json`), or a folder
            with one of these; names as in the model's state dict.
        config: default `QuantConfig()`.
        ignore: patterns (`fnmatch`) of names in the checkpoint that the model does not need.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, one that does not fit the model, or what `quantize_` refuses.
        TypeError: a weight is not floating.
    """
    config = config or QuantConfig()
    work = plan(model, config, _WHERE)
    stored = TensorFiles(path, _WHERE)
    kept = {k: v for k, v in stored.items() if not any(fnmatchcase(k, p) for p in ignore)}
    check_fit(model, {}, kept, _WHERE, lambda got: _misfit(path, got))
    for name in work.quantized:
        if not (dtype := kept[f"{name}.weight"].dtype) or not dtype.is_floating_point:
            raise TypeError(
                f"{_WHERE}: {name}.weight must be floating, got {dtype}; the checkpoint may be "
                "quantized already: see zo_kernels.quant.imports"
            )
    bytes_before = model_bytes(model)
    names = aliases(model)
    for name in work.quantized:
        layer = model.get_submodule(name)
        empty = layer.get_parameter("weight")
        weight = kept.pop(f"{name}.weight").make().to(empty.dtype)
        check_weight(weight, _WHERE, f"{name}.weight")
        layer.register_parameter("weight", nn.Parameter(weight, empty.requires_grad))
        del weight, layer
        quantize_layer_(model, name, names[name], work, config)
    fill_rest_(model, kept, {}, cast=True)
    setattr(model, CONFIG_ATTRIBUTE, config)
    return QuantReport.of(work, bytes_before, model)


def _misfit(path: str | os.PathLike[str], got: str) -> ValueError:
    return ValueError(
        f"{_WHERE}: model must have the architecture of {path}, got {got}; build it from the "
        "checkpoint's config, or name what it does not need in ignore"
    )
