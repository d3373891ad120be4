# SPDX-License-Identifier: Apache-2.0
"""Options of scale tuning."""

from dataclasses import dataclass
from typing import Any, ClassVar

from persona.config import check_cuda_graph
from persona.config_backprop import BackpropConfig
from persona.errors import UserError
from persona.intervals import Intervals
from persona.options import option

# What a preset and an optimizer give where an option is left open (0 or "").
_OPEN: dict[tuple[str, str], dict[str, Any]] = {
    ("ours", "bp"): {
        "parametrization": "relative",
        "max_train_steps": 400,
        "learning_rate": 2e-3,
    },
    ("ours", "zo"): {
        "parametrization": "relative",
        "max_train_steps": 1000,
        "learning_rate": 0.1,
    },
    ("paper", "bp"): {
        "parametrization": "additive",
        "max_train_steps": 400,
        "learning_rate": 3e-6,
        "in_scale_std": 0.01,
    },
    ("released-code", "bp"): {
        "parametrization": "additive",
        "max_train_steps": 400,
        "learning_rate": 3e-6,
    },
}


@dataclass(frozen=True)
class ScaleTuningConfig(BackpropConfig):
    """Train the scales of a quantized UNet, and nothing else: PEQA, S1, S2 and TuneQDM.

    Presets: `paper` is TuneQDM's recipe (arXiv 2401.04339: AdamW on the scales themselves, 3e-6,
    400 steps, input scales from N(1, 0.01)), `released-code` the same from ones, as its code does.
    `ours` trains r of s = s0 (1 + r), whose steps mean the same at 8 and 4 bits.

    Raises:
        UserError: a value is out of range, or options contradict each other.
    """

    command: ClassVar[str] = "scales"

    method: str = option(
        "peqa",
        "peqa: one set; s1: one, in chosen intervals; s2: one an interval; tuneqdm: and for inputs",
        choices=("peqa", "s1", "s2", "tuneqdm"),
    )
    optimizer: str = option(
        "bp", "backpropagation, or zeroth order: forward passes only", choices=("bp", "zo")
    )
    preset: str = option(
        "ours",
        "where the options with the default 0 or '' come from",
        choices=("ours", "paper", "released-code"),
    )
    parametrization: str = option(
        "",
        "what trains: r of s = s0 (1 + r), or d of s = s0 + d; '': the preset's",
        choices=("", "relative", "additive"),
    )
    num_intervals: int = option(4, "of s2 and tuneqdm, of equal length", "num_experts", at_least=1)
    intervals: str = option("500-1000", "of s1: LOW-HIGH,LOW-HIGH, upper ends exclusive")
    outside: str = option(
        "original",
        "scales of s1 where no interval is, when pictures are made",
        choices=("original", "tuned"),
    )
    in_scale_std: float = option(
        0.0, "spread around 1 that the input scales of tuneqdm start with", at_least=0
    )
    max_train_steps: int = option(
        0, "steps; 0: the preset's, 400 (zo: 1000)", at_least=0, may_change=True
    )
    learning_rate: float = option(
        0.0, "in units of what trains; 0: the preset's, 2e-3 (zo: 0.1)", at_least=0
    )
    zo_n: int = option(8, "random directions a step, two forwards each (zo)", "n", at_least=1)
    zo_eps: float = option(1e-2, "probe radius, in units of what trains (zo)", "mu", positive=True)
    evaluations_per_forward: int = option(
        0,
        "perturbed evaluations a forward (zo); 0: as many as hold what drawing a picture does",
        at_least=0,
        may_change=True,
    )
    cuda_graph: bool = option(
        False,
        "replay the UNet's forwards as CUDA graphs (zo, on a GPU; not tuneqdm)",
        may_change=True,
    )

    def __post_init__(self) -> None:
        values = _OPEN.get((self.preset, self.optimizer))
        if values is None and self.preset in ("paper", "released-code"):
            raise UserError(
                f"preset: must be ours where optimizer is {self.optimizer}, got {self.preset!r}; "
                "the paper trains by backpropagation"
            )
        for name, value in (values or {}).items():
            object.__setattr__(self, name, getattr(self, name) or value)
        super().__post_init__()
        if self.base_precision == "as-loaded":
            raise UserError(
                "base_precision: must be int8 or int4, got as-loaded; a floating model has no "
                "scales to train"
            )
        Intervals.selected(self.intervals)
        check_cuda_graph(self.cuda_graph, self.optimizer)
        if self.cuda_graph and self.method == "tuneqdm":
            raise UserError(
                "cuda_graph: must be left out where method is tuneqdm, got both; its perturbed "
                "input scales are made anew for each forward, use peqa, s1 or s2"
            )

    def served(self, limit: int) -> Intervals:
        """Which set serves which of ``limit`` timesteps when pictures are made."""
        if self.method == "peqa" or (self.method == "s1" and self.outside == "tuned"):
            return Intervals.uniform(1, limit)
        if self.method == "s1":
            return Intervals.selected(self.intervals)
        return Intervals.uniform(self.num_intervals, limit)
