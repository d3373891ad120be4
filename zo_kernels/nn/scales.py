# SPDX-License-Identifier: Apache-2.0
"""The scales of quantized modules, as what is trained while the integers stay.

Scales of the output alone are PEQA (arXiv 2305.14152); with a factor for each channel of the input
they are TuneQDM's "multi-channel-wise scale update" (arXiv 2401.04339 v2). They are buffers, and
stay buffers: a module takes any tensor in their place, also one that is computed from what an
optimizer holds, and several sets of scales can take turns in one model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from zo_kernels.nn._base import QuantModule
from zo_kernels.nn._choose import chosen

WHATS = ("scale", "in_scale")


def trainable_scales(
    model: nn.Module, what: Sequence[str] = ("scale",), names: Sequence[str] = ("*",)
) -> dict[str, Tensor]:
    """Give quantized modules scales of their own that require a gradient.

    A module without `in_scale` gets one of ones. The gradients need no floating weight; see
    `zo_kernels.ops.qlinear`. To freeze them: `set_scales_` with detached tensors.

    Example:
        >>> scales = trainable_scales(unet, what=("scale", "in_scale"))
        >>> optimizer = torch.optim.AdamW(scales.values(), lr=3e-6)

    Args:
        model: contains quantized modules.
        what: of each module, "scale" (output channels, or groups) and "in_scale" (channels of the
            input).
        names: patterns (`fnmatch`) on the modules' names in `model`.

    Returns:
        "<module>.scale" and "<module>.in_scale" -> fp32 leaf tensor; those that the modules hold.

    Raises:
        TypeError: names is one string.
        ValueError: there is no such `what`, or a pattern matches no quantized module.
    """
    if isinstance(what, str) or not what or not set(what) <= set(WHATS):
        raise ValueError(
            f"trainable_scales: what must be a sequence of {', '.join(WHATS)}, got {what!r}; "
            'give ("scale",) for scales of the output'
        )
    made = {}
    for name, module in chosen(model, names, "trainable_scales").items():
        for kind in what:
            now = getattr(module, kind)
            if now is None:
                now = torch.ones(module.inputs, device=module.scale.device)
            leaf = now.detach().clone().requires_grad_()
            setattr(module, kind, leaf)
            made[f"{name}.{kind}"] = leaf
    return made


def set_scales_(model: nn.Module, scales: Mapping[str, Tensor | None]) -> None:
    """Put scales where the modules hold theirs, without a copy: what they are a function of has its
    gradient. Checked before the first one changes.

    Args:
        model: contains quantized modules.
        scales: named as `trainable_scales` names them; None takes an `in_scale` away.

    Raises:
        TypeError: one is not fp32.
        ValueError: a name that the model does not have, or another shape.
    """
    modules = {n: m for n, m in model.named_modules() if isinstance(m, QuantModule)}
    for name, scale in scales.items():
        owner, _, kind = name.rpartition(".")
        if owner not in modules or kind not in WHATS:
            raise ValueError(
                f"set_scales_: scales must belong to quantized modules, got {name!r}, which is of "
                f"none of {len(modules)}; use the names of trainable_scales"
            )
        _check(name, kind, modules[owner], scale)
    for name, scale in scales.items():
        owner, _, kind = name.rpartition(".")
        setattr(modules[owner], kind, scale)


def _check(name: str, kind: str, module: QuantModule, scale: Tensor | None) -> None:
    if scale is None and kind == "in_scale":
        return
    shape = tuple(module.scale.shape) if kind == "scale" else (module.inputs,)
    if scale is None or tuple(scale.shape) != shape:
        got = None if scale is None else list(scale.shape)
        raise ValueError(
            f"set_scales_: {name} must be of shape {list(shape)}, got {got}; "
            "give the scales of a model that was quantized alike"
        )
    if scale.dtype != torch.float32:
        raise TypeError(f"set_scales_: {name} must be float32, got {scale.dtype}; cast it")
