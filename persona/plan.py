# SPDX-License-Identifier: Apache-2.0
"""What a run will hold, part by part, told before it: ``persona plan`` and ``--memory_budget``.

The method itself runs, a step of each of its kinds, on a model without values (`persona.outline`).
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from persona.class_pictures import BATCH
from persona.config import RunConfig
from persona.config_selective import SelectiveConfig
from persona.data import Example
from persona.device import chosen
from persona.errors import UserError
from persona.memory import human, resident_bytes
from persona.methods._method import Method
from persona.methods.selective import KINDS
from persona.outline import FlashAttention, Ledger, Outline

_KEPT = 128 << 20  # bytes: kKept of csrc/cpu/pool.h
# What a user may give up, the least first.
SAVERS: tuple[dict[str, Any], ...] = (
    {"evaluations_per_forward": 1},
    {"gradient_checkpointing": True},
    {"base_precision": "int8"},
    {"base_precision": "int4"},
    {"train_batch_size": 1},
)


@dataclass(frozen=True)
class Plan:
    """The most that a run holds at its highest points.

    Attributes:
        libraries: bytes of Python and the libraries; 0 on a GPU, where torch's count begins anew.
        kept: bytes that the CPU kernels may keep for their next outputs; 0 on a GPU.
        parts: part of the run -> bytes at its highest point, both among them.
    """

    libraries: int
    kept: int
    parts: dict[str, int]

    @property
    def highest(self) -> int:
        return max(self.parts.values())

    @property
    def highest_part(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])

    def __str__(self) -> str:
        lines = [f"{human(size):>10}  {part}" for part, size in self.parts.items()]
        total = f"highest: {human(self.highest)}, {self.highest_part}"
        if self.libraries:
            total += f"; {human(self.libraries)} of it are Python and libraries, and "
            total += f"{human(self.kept)} what the CPU kernels may keep for their next outputs"
        return "\n".join([*lines, total])


def plan(method_class: type[Method], config: RunConfig) -> Plan:
    """The highest memory of each part of `persona.train.train`, without weights and pictures.

    On the CPU an upper bound: what the kernels keep between two layers differs from run to run.

    Args:
        method_class: as `train` takes it.
        config: its options; ``train_data_dir`` is not read.

    Raises:
        UserError: what `train` says of the model and the options.
    """
    config.require("pretrained_model_name_or_path")
    device = chosen(config.device)
    peaks: dict[str, int] = {}
    ledger = Ledger(host=device.type == "cpu")
    libraries = kept = 0
    with tempfile.TemporaryDirectory() as folder, FlashAttention(), ledger:
        short = _short(config, folder)
        family = Outline.of(config, ledger)
        side = config.resolution or family.resolution
        blank = Example(Path("blank.png"), Image.new("RGB", (side, side)), ("a photo of {}",))
        with ledger.part("loading", peaks):
            method = method_class(family, short, [blank])
            family.need("text_encoder", "unet")
        with ledger.part("pictures before", peaks):
            latents = _latents(family, config)
        with ledger.part("training", peaks):
            for _ in islice(method.run(), short.max_train_steps):
                pass
        with ledger.part("pictures after", peaks):
            _latents(family, config)
        if device.type == "cpu":
            # Modules are there, as they are in a run.
            libraries, kept = resident_bytes(), _KEPT
        del method
        family.release("text_encoder", "unet")
        with ledger.part("decoding", peaks):
            if latents is not None:
                family.decode(latents)
    beside = libraries + kept
    return Plan(libraries, kept, {name: beside + size for name, size in peaks.items()})


def keep_budget(method_class: type[Method], config: RunConfig) -> None:
    """Refuse a run that would hold more than ``config.memory_budget``.

    Raises:
        UserError: it would; with the least change of options that fits, if there is one.
    """
    if config.budget is None:
        return
    planned = plan(method_class, config)
    if planned.highest <= config.budget:
        return
    part = planned.highest_part
    least = planned.highest
    for change in _changes(config):
        try:
            found = plan(method_class, dataclasses.replace(config, **change))
        except UserError:  # the method does not allow it
            continue
        least = min(least, found.highest)
        if found.highest <= config.budget:
            hint = f"{_as_flags(change)} takes {human(found.highest)}"
            break
    else:
        hint = f"the least that other options take is {human(least)}"
    raise UserError(
        f"memory_budget: must be at least {human(planned.highest)}, which {part} takes, got "
        f"{config.memory_budget}; {hint}"
    )


def _changes(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Each of `SAVERS` alone, then more and more of them."""
    useful = [
        change
        for change in (_known(config, saver) for saver in SAVERS)
        if any(_saves(config, name, value) for name, value in change.items())
    ]
    yield from useful
    together: dict[str, Any] = {}
    for count, change in enumerate(useful):
        together |= change
        if count:
            yield dict(together)


def _saves(config: RunConfig, name: str, value: Any) -> bool:
    """Whether it is a change, and not one to more precision."""
    held = getattr(config, name)
    if name == "base_precision":
        order = ("as-loaded", "int8", "int4")
        return order.index(value) > order.index(held)
    return bool(held != value)


def _as_flags(change: dict[str, Any]) -> str:
    return " ".join(
        f"--{name}" if value is True else f"--{name} {value}" for name, value in change.items()
    )


def _short(config: RunConfig, folder: str) -> Any:
    """The same options, for a run of so few steps that each kind of them comes twice: what the
    first makes, the second holds beside its activations."""
    wanted: dict[str, Any] = {"output_dir": folder, "max_train_steps": 2, "cuda_graph": False}
    if isinstance(config, SelectiveConfig) and config.strategy not in KINDS:
        wanted |= {"strategy": "two-phase", "bp_share": 0.5, "max_train_steps": 4}
    if hasattr(config, "num_class_images"):
        wanted["num_class_images"] = min(config.num_class_images, BATCH)
    wanted["initializer_token"] = config.initializer_token or "a"
    return dataclasses.replace(config, **_known(config, wanted))


def _known(config: RunConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Those that the command has."""
    names = {item.name for item in dataclasses.fields(config)}
    return {name: value for name, value in options.items() if name in names}


def _latents(family: Outline, config: RunConfig) -> Tensor | None:
    prompts = [config.subject] * config.num_validation_images
    if not prompts:
        return None
    return family.sample_latents(prompts, seed=0, steps=1, guidance=config.guidance_scale)
