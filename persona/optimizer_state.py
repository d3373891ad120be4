# SPDX-License-Identifier: Apache-2.0
"""The state of an optimizer as named tensors, which is all that a checkpoint holds."""

import json
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

REST = "rest"  # what is no tensor: numbers, groups; JSON keeps every float exactly


def flatten(optimizer: Optimizer) -> dict[str, Tensor]:
    """``{"0.exp_avg": ..., "rest": the others as the bytes of a JSON object}``."""
    whole = optimizer.state_dict()
    named = {f"{i}.{k}": v for i, values in whole.pop("state").items() for k, v in values.items()}
    tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    numbers = {k: v for k, v in named.items() if k not in tensors}
    text = json.dumps({"numbers": numbers, **whole}).encode()
    return {**tensors, REST: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def restore(optimizer: Optimizer, state: dict[str, Tensor]) -> None:
    """The inverse of `flatten`, into an optimizer of the same parameters."""
    whole = json.loads(bytes(state[REST].tolist()))
    values: dict[str, Any] = {k: v for k, v in state.items() if k != REST}
    members: dict[int, dict[str, Any]] = {}
    for key, value in (values | whole.pop("numbers")).items():
        index, name = key.split(".", 1)
        members.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": members, **whole})


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def part_of(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `prefixed`: the tensors of one part of a state."""
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
