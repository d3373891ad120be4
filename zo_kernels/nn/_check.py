# SPDX-License-Identifier: Apache-2.0
"""What a quantized module refuses: weights that cannot be rounded, integers and states that do not
fit it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels.nn._spec import Spec
from zo_kernels.packing import PACKING


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
            "load the model before you quantize it, or use zo_kernels.quant.quantize_checkpoint"
        )
    # The extremes are NaN if one value is: no temporary of the size of the weight.
    extremes = torch.stack(weight.detach().aminmax()).float() if weight.numel() else weight
    if not bool(torch.isfinite(extremes).all()):
        bad = weight.numel() - int(torch.isfinite(weight.detach().float()).sum())
        raise ValueError(
            f"{where}: {name} must be finite, got {bad} values that are NaN or infinite in fp32; "
            "repair the checkpoint, or skip this layer"
        )


def check_codes(
    where: str,
    spec: Spec,
    shape: Sequence[int],
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
) -> None:
    """Raise unless the integers make a weight of this shape and spec."""
    if (zero_point is None) == spec.asymmetric:
        raise ValueError(
            f"{where}: zero_point must be {'given' if spec.asymmetric else 'None'} for {spec}, got "
            f"{'None' if zero_point is None else 'one'}; choose the spec that the weight has"
        )
    scales = spec.scale_shape(shape)
    for name, tensor, dtype, wanted in (
        ("codes", codes, torch.int8, tuple(shape)),
        ("scale", scale, torch.float32, scales),
        ("zero_point", zero_point, torch.int8, scales),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{where}: {name} must be {dtype}, got {tensor.dtype}; cast it")
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{where}: {name} must be {list(wanted)} for {spec} and a weight of {list(shape)}, "
                f"got {list(tensor.shape)}; check which layer it belongs to"
            )
        if tensor.device != codes.device:
            raise ValueError(
                f"{where}: {name} must be on the device of codes ({codes.device}), "
                f"got {tensor.device}; move it"
            )
    check_scale(where, "scale", scale)


def check_scale(where: str, name: str, scale: Tensor) -> None:
    """Raise unless every scale is finite; on the meta device there is nothing to look at."""
    if not scale.is_meta and not bool(torch.isfinite(scale).all()):
        bad = int((~torch.isfinite(scale)).sum())
        raise ValueError(
            f"{where}: {name} must be finite, got {bad} values that are NaN or infinite; "
            "the weight it was made from was not, or the file is damaged"
        )


def check_state(prefix: str, spec: Spec, inputs: int, state: Mapping[str, Any]) -> None:
    """Raise ValueError if a state dict has this layer in another layout or with a bad scale.

    Args:
        inputs: channels of the input.
        state: by name in the module, what the state dict has for it; None is left to torch.
    """
    where, extra, packed = "load_state_dict", state["_extra_state"], state["qweight"]
    if packed is None and extra is None:
        return
    got = json.loads(bytes(extra.tolist())) if isinstance(extra, Tensor) else {}
    for field, mine in (("packing", PACKING), ("spec", str(spec))):
        if got.get(field) != mine:
            raise ValueError(
                f"{where}: {prefix}_extra_state must tell {field} {mine}, got "
                f"{got.get(field, 'none')}; state dicts serve equal modules of one version: "
                "use save_quantized and load_quantized, or quantize the model alike"
            )
    for name, dtype in (
        ("qweight", torch.uint8),
        ("scale", torch.float32),
        ("zero_point", torch.int8),
        ("in_scale", torch.float32),
    ):
        tensor = state[name]
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(
                f"{where}: {prefix}{name} must be {dtype}, got {tensor.dtype}; "
                "it is the state of another kind of layer"
            )
    in_scale = state["in_scale"]
    if in_scale is not None and tuple(in_scale.shape) != (inputs,):
        raise ValueError(
            f"{where}: {prefix}in_scale must be [{inputs}], got shape {list(in_scale.shape)}; "
            "it is the state of another layer"
        )
    for name in ("scale", "in_scale"):
        if state[name] is not None:
            check_scale(where, f"{prefix}{name}", state[name])
