# SPDX-License-Identifier: Apache-2.0
"""`load_torchao`: int8 weights of torchao (`Int8WeightOnlyConfig`,
`Int8DynamicActivationInt8WeightConfig`).

The state dict of a model that torchao quantized holds `Int8Tensor`s: `qdata` int8 [N, K], `scale`,
perhaps `zero_point`, `block_size` (the part of the weight that shares a scale), and
`act_quant_kwargs` where activations are rounded. torchao's safetensors
(`flatten_tensor_state_dict`) hold the tensors `<module>._<parameter>_<attribute>`, and the rest as
JSON in the metadata.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels.nn import Spec
from zo_kernels.nn._spec import GROUPS
from zo_kernels.quant._fill import Integers, entry_of
from zo_kernels.quant._safetensors import Entry, TensorFiles
from zo_kernels.quant.convert import QuantReport
from zo_kernels.quant.imports._assemble import Source, assemble_, per_channel

_WHERE = "load_torchao"
_PLAIN = ("Tensor", "Parameter")


@dataclass(frozen=True)
class _Int8:
    """An `Int8Tensor`, from memory or from a file.

    Attributes:
        parts: attribute -> tensor; those that are None are absent.
        activations: None, or (name of the granularity, name of the mapping).
    """

    parts: dict[str, Entry]
    block_size: tuple[int, ...]
    activations: tuple[str, str] | None


def load_torchao(model: nn.Module, source: Source, *, act_bits: int | None = None) -> QuantReport:
    """Turn a float `model` into a quantized one with the int8 weights of torchao.

    scale * (code - zero point) is, in fp32, exactly what torchao dequantizes. Rows and groups of
    32, 64 and 128 columns are taken over as they are, one scale for the whole tensor is repeated.
    Dynamic activations per row become act_bits 8, rounded by our own rule (absmax / 127).

    Example:
        >>> quantize_(model, Int8DynamicActivationInt8WeightConfig())  # torchao
        >>> load_torchao(make_float_model(), model.state_dict())

    Args:
        model: the architecture before torchao; it may be on the meta device. Floats take its
            dtypes.
        source: the state dict, or safetensors that torchao's flattening made.
        act_bits: None: as the source rounds activations; 16: keep their dtype; 8: round them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor subclass other than Int8Tensor; blocks, or activations that are not
            rounded per row, symmetrically and dynamically, unless act_bits is given; scaled
            activations (SmoothQuant, AWQ); or a source that does not fit the model.
    """
    weights, rest = _split(source) if isinstance(source, Mapping) else _split_file(source)
    integers = {name: _integers(name, weight, act_bits) for name, weight in weights.items()}
    return assemble_(model, integers, rest, act_bits, _WHERE)


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, _Int8], dict[str, Entry]]:
    weights: dict[str, _Int8] = {}
    rest: dict[str, Entry] = {}
    for name, value in state.items():
        if type(value).__name__ in _PLAIN:
            rest[name] = entry_of(value)
            continue
        _check_type(name, type(value).__name__)
        found = {key: getattr(value, key, None) for key in _ATTRIBUTES}
        kwargs: Any = getattr(value, "act_quant_kwargs", None)
        weights[name] = _Int8(
            {key: entry_of(tensor) for key, tensor in found.items() if tensor is not None},
            tuple(value.block_size),  # type: ignore[attr-defined]
            kwargs and (type(kwargs.granularity).__name__, kwargs.mapping_type.name),
        )
    return weights, rest


_ATTRIBUTES = (
    *("qdata", "scale", "zero_point"),
    *("act_pre_scale", "act_quant_scale", "act_quant_zero_point"),
)


def _split_file(source: Any) -> tuple[dict[str, _Int8], dict[str, Entry]]:
    files = TensorFiles(source, _WHERE)
    weights: dict[str, _Int8] = {}
    rest = dict(files)
    for name, text in sorted(files.metadata.items()):
        if not (text.startswith("{") and '"_type"' in text):
            continue
        described = json.loads(text)
        if described["_type"] in _PLAIN:
            continue
        _check_type(name, described["_type"])
        module, _, parameter = name.rpartition(".")
        prefix = f"{module}._{parameter}_" if module else f"_{parameter}_"
        parts = {key: rest.pop(prefix + key) for key in _ATTRIBUTES if prefix + key in rest}
        if not {"qdata", "scale"} <= parts.keys():
            raise ValueError(
                f"{_WHERE}: {name} must have qdata and scale in the file, got {sorted(parts)}; "
                "save it again with flatten_tensor_state_dict"
            )
        data = described["_data"]
        kwargs = data.get("act_quant_kwargs")
        weights[name] = _Int8(
            parts,
            tuple(data["block_size"]),
            kwargs
            and (
                kwargs["_data"]["granularity"]["_type"],
                kwargs["_data"]["mapping_type"]["_data"],
            ),
        )
    return weights, rest


def _check_type(name: str, kind: str) -> None:
    if kind != "Int8Tensor":
        raise ValueError(
            f"{_WHERE}: {name} must be an Int8Tensor or plain, got {kind}; other types of torchao "
            "have no exact counterpart, or are of a version before 0.14: quantize the float model"
        )


def _integers(name: str, weight: _Int8, act_bits: int | None) -> Integers:
    parts = weight.parts
    shape = parts["qdata"].shape
    if "act_pre_scale" in parts:
        raise ValueError(
            f"{_WHERE}: {name} must have no act_pre_scale, got one; fold it into the layer before"
        )
    rounded = 8
    if weight.activations is None:
        rounded = 16
    elif act_bits is None and (
        weight.activations != ("PerRow", "SYMMETRIC") or "act_quant_scale" in parts
    ):
        raise ValueError(
            f"{_WHERE}: {name} must have activations that are rounded per row, symmetrically and "
            f"dynamically, got {' '.join(weight.activations)}"
            f"{' with static scales' if 'act_quant_scale' in parts else ''}; choose act_bits"
        )
    zeros = parts.get("zero_point")
    asymmetric = zeros is not None and bool(zeros.make().any())
    spec = Spec(8, rounded, _group(name, weight, shape), asymmetric)

    def of(entry: Entry, dtype: torch.dtype) -> Any:
        return lambda: per_channel(entry.make().to(dtype), spec, shape)

    zero_point = of(zeros, torch.int8) if asymmetric and zeros is not None else None
    return Integers(spec, shape, parts["qdata"].make, of(parts["scale"], torch.float32), zero_point)


def _group(name: str, weight: _Int8, shape: tuple[int, ...]) -> int | None:
    rows, *columns = weight.block_size
    whole = tuple(columns) == shape[1:]
    if whole and rows in (1, shape[0]):
        return None
    if rows == 1 and len(shape) == 2 and columns[0] in GROUPS:
        return columns[0]
    raise ValueError(
        f"{_WHERE}: {name} must share scales along a row, a group of {GROUPS} of its columns or "
        f"the whole tensor, got blocks of {list(weight.block_size)} in {list(shape)}; quantize the "
        "float model"
    )
