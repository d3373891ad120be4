# SPDX-License-Identifier: Apache-2.0
"""The device that a run's model computes on: `--device`.

What learns a token, draws pictures, noise and timesteps, and all generators, stay on the CPU, so
that a run sees the same on each device, and one may go on where another began.
"""

import re

import torch

from persona.errors import UserError


def chosen(name: str) -> torch.device:
    """The device of an option's value: "auto" is "cuda" where there is one, else "cpu".

    Raises:
        UserError: the name is none of auto, cpu, cuda and cuda:N, or there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        hint = "auto takes a CUDA device where there is one"
        if name.startswith("mps"):
            hint = "MPS has no float64, which the ops' references need; use cpu"
        raise UserError(f"device: must be auto, cpu, cuda or cuda:N, got {name!r}; {hint}")
    device = torch.device(name)
    if device.type == "cuda":
        _check_cuda(device)
    return device


def _check_cuda(device: torch.device) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) < count:
        return
    if not torch.backends.cuda.is_built():
        raise UserError(
            f"device: must be cpu where torch is built without CUDA, got '{device}'; use cpu, or "
            "install a torch with CUDA"
        )
    there = ", ".join(f"cuda:{i}" for i in range(count)) or "no CUDA device"
    raise UserError(
        f"device: must be one that torch sees, got '{device}' where there is {there}; use cpu or "
        "auto, or see CUDA_VISIBLE_DEVICES and the driver"
    )
