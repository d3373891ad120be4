# SPDX-License-Identifier: Apache-2.0
"""Sets of scales of a quantized UNet that take turns by timestep, and the file that holds them.

The file is a safetensors: `<layer>.scale` [S, ...] and, where input scales were trained,
`<layer>.in_scale` [S, inputs], fp32, for S sets. Its header has, beside what the run says of
itself, one entry `persona.scales`, a JSON object:

| field | value |
|---|---|
| `version` | 1 |
| `ranges` | [low, high) in timesteps, for each interval; elsewhere the base model's scales serve |
| `sets` | number of the set of each interval |
| `base` | SHA-256 of the integers and scales that the sets were made for; see `digest` |
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from persona.errors import UserError
from persona.files import write_tensors
from persona.intervals import Intervals
from zo_kernels.nn import QuantModule, set_scales_

FILE = "scales.safetensors"
_KEY, _VERSION = "persona.scales", 1
Scales = Mapping[str, Tensor | None]  # as `zo_kernels.nn.set_scales_` takes them


class Switch:
    """Before each forward pass of a UNet, put the scales of its timestep in place.

    Args:
        unet: called with (sample, timestep, ...), as diffusers' pipelines do.
        intervals: which set serves which timestep.
        scales: number of a set -> its scales; called before each pass.
        base: the scales where no set serves.
        fixed: the modules hold copies that stay where they are in memory, for who captures a CUDA
            graph of them. Sets have no gradient and no input scales then.
    """

    def __init__(
        self,
        unet: nn.Module,
        intervals: Intervals,
        scales: Callable[[int], Scales],
        base: Scales,
        fixed: bool = False,
    ) -> None:
        self.unet, self.intervals, self.scales, self.base = unet, intervals, scales, base
        self._held = False
        self._own: dict[str, Tensor] = {}
        if fixed:
            self._own = {name: scale.clone() for name, scale in base.items() if scale is not None}
            set_scales_(unet, self._own)
        self._handle = unet.register_forward_pre_hook(self._hook, with_kwargs=True)

    def place(self, number: int | None) -> None:
        """Put set `number` in place, or the base model's scales."""
        scales = self.base if number is None else self.scales(number)
        if not self._own:
            set_scales_(self.unet, scales)
            return
        with torch.no_grad():
            now = [scale for scale in (scales[name] for name in self._own) if scale is not None]
            torch._foreach_copy_(list(self._own.values()), now)

    @contextmanager
    def held(self, number: int | None) -> Iterator[None]:
        """Within the block set `number` is in place whatever the timestep, which nobody reads: on a
        GPU the host would have to wait for it."""
        self.place(number)
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def remove(self) -> None:
        """Leave the UNet as it was before."""
        self._handle.remove()
        self.place(None)

    def _hook(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._held:
            return
        t = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        groups = self.intervals.groups(t.reshape(-1))
        if len(groups) > 1:
            raise ValueError(
                "Switch: timestep must lie in one interval for a forward pass, got "
                f"{t.tolist()}; split the batch by Intervals.groups"
            )
        self.place(next(iter(groups)))


@torch.no_grad()
def save_scales(
    path: Path, sets: list[dict[str, Tensor]], intervals: Intervals, base: str, more: dict[str, str]
) -> None:
    """Write sets of scales.

    Args:
        sets: "<layer>.scale" or "<layer>.in_scale" -> fp32, the same names in each.
        base: `digest` of the UNet that they belong to.
        more: strings for the header.

    Raises:
        UserError: a scale is not finite, or the folder refuses.
    """
    tensors = {name: torch.stack([scales[name] for scales in sets]) for name in sets[0]}
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UserError(
            f"learning_rate: must leave scales finite, got NaN or infinity in {bad[0]}; lower it "
            "and train again"
        )
    header = {"version": _VERSION, "ranges": intervals.ranges, "sets": intervals.sets, "base": base}
    write_tensors(path, tensors, more | {"format": "pt", _KEY: json.dumps(header)})


def load_scales(unet: nn.Module, path: Path) -> Switch:
    """Give a quantized UNet the scales of a file; they are switched by timestep from then on.

    Example:
        >>> switch = load_scales(pipe.unet, Path("out/scales.safetensors"))
        >>> picture = pipe("a photo of sks dog in a bucket").images[0]

    Args:
        unet: quantized as the one that the scales were trained on was; left as it is on an error.
        path: written by `save_scales`.

    Returns:
        What switches; its `remove` takes the scales away.

    Raises:
        UserError: the file cannot be read, or belongs to another model.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"scales: must be a readable file of persona scales, got {path} ({error}); "
            "train them again"
        ) from error
    version = header.get("version") if isinstance(header, dict) else None
    if version != _VERSION:
        raise UserError(
            f"scales: must be a file of persona scales, version {_VERSION}, got {path} with "
            f"version {version}; train them again, or update persona"
        )
    if header["base"] != digest(unet):
        raise UserError(
            f"scales: must belong to this model, got {path}, which was trained on other integers; "
            "load the model that it names, quantized alike"
        )
    ranges = tuple((low, high) for low, high in header["ranges"])
    intervals = Intervals(ranges, tuple(header["sets"]))
    device = next(unet.parameters()).device
    sets = [
        {name: tensor[i].contiguous().to(device) for name, tensor in tensors.items()}
        for i in range(intervals.count)
    ]
    base = {name: getattr(*_owner(unet, name)) for name in tensors}
    return Switch(unet, intervals, sets.__getitem__, base)


def digest(unet: nn.Module) -> str:
    """SHA-256 of what the quantized layers of a UNet are: names, codes, zero points and scales."""
    found = hashlib.sha256()
    for name, module in unet.named_modules():
        if not isinstance(module, QuantModule):
            continue
        found.update(f"{name} {module.spec}".encode())
        for tensor in (module.codes(), module.scale, module.zero_point, module.in_scale):
            if tensor is not None:
                found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()


def _owner(unet: nn.Module, name: str) -> tuple[nn.Module, str]:
    layer, _, kind = name.rpartition(".")
    return unet.get_submodule(layer), kind
