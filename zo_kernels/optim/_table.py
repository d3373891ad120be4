# SPDX-License-Identifier: Apache-2.0
"""What the header of a trajectory says of an optimizer and its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import _zolog
from zo_kernels._zolog import SETTINGS, check
from zo_kernels.optim._step import ZOOptimizer

Named = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def params_of(optimizer: ZOOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def pairs_of(params: Named) -> list[tuple[str, Tensor]]:
    """Names and tensors; a tied one comes under each of its names."""
    if isinstance(params, nn.Module):
        return list(params.named_parameters(remove_duplicate=False))
    return list(params.items() if isinstance(params, Mapping) else params)


def names_of(optimizer: ZOOptimizer, params: Named | None) -> list[list[str]]:
    """The names of each parameter, in the order of the groups."""
    if params is None:
        names = [group.get("param_names", ()) for group in optimizer.param_groups]
        params = zip([n for row in names for n in row], params_of(optimizer), strict=False)
    found: dict[int, list[str]] = {}
    for name, p in pairs_of(params):
        found.setdefault(id(p), []).append(name)
    missing = [i for i, p in enumerate(params_of(optimizer)) if id(p) not in found]
    check(
        not missing,
        "TrajectoryWriter",
        "params",
        "the model, or named parameters, with every tensor of the optimizer",
        f"{len(missing)} without a name",
        "a replay finds tensors by name",
    )
    return [found[id(p)] for p in params_of(optimizer)]


def header_of(optimizer: ZOOptimizer, names: list[list[str]]) -> dict[str, Any]:
    kind = type(optimizer).__name__
    streams = [s for group in optimizer.param_groups for s in group["streams"]]
    numbers = [g for g, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    rows = zip(names, params_of(optimizer), streams, numbers, strict=True)
    return {
        "contract": _zolog.CONTRACT,
        "optimizer": kind,
        "seed": optimizer.seed,
        "kind": optimizer.kind,
        "n": optimizer.n,
        "estimator": optimizer.estimator,
        "draw": optimizer.draw,
        "updates": optimizer.steps - optimizer.rejected,
        "groups": [settings_of(group, kind) for group in optimizer.param_groups],
        "tensors": [
            {
                "names": own,
                "shape": list(p.shape),
                "dtype": dtype_of(p),
                "stream": stream,
                "group": number,
            }
            for own, p, stream, number in rows
        ],
    }


def settings_of(group: dict[str, Any], kind: str) -> dict[str, float]:
    """What an update reads of a group."""
    betas = dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False))
    return {name: float((group | betas)[name]) for name in SETTINGS[kind]}


def group_of(settings: dict[str, float]) -> dict[str, Any]:
    """The inverse."""
    group: dict[str, Any] = dict(settings)
    if "beta1" in group:
        group["betas"] = (group.pop("beta1"), group.pop("beta2"))
    return group


def dtype_of(p: Tensor) -> str:
    return _DTYPES.get(p.dtype, str(p.dtype))


def bytes_of(p: Tensor) -> memoryview | bytes:
    flat = p.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
