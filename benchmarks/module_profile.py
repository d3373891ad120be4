# SPDX-License-Identifier: Apache-2.0
"""Where the time of a forward goes, by kind of module and function, each counted without what it
calls. On the CPU, where a call returns when its work is done."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

REST = "rest (Python, cheap functions)"
COPIES = "layout and dtype copies"
MODULES = {
    "Linear": "Linear",
    "QuantLinear": "Linear",
    "Conv2d": "Conv2d",
    "QuantConv2d": "Conv2d",
    "GroupNorm": "GroupNorm",
    "LayerNorm": "LayerNorm",
    "SiLU": "SiLU, GELU",
    "GELU": "SiLU, GELU",
}
FUNCTIONS = {
    "linear": "Linear",
    "qlinear": "Linear",
    "conv2d": "Conv2d",
    "qconv2d": "Conv2d",
    "quantize_rows": "quantize_rows",
    "scaled_dot_product_attention": "attention",
    "qattention": "attention",
    "group_norm": "GroupNorm",
    "group_norm_quantize": "GroupNorm",
    "layer_norm": "LayerNorm",
    "layer_norm_quantize": "LayerNorm",
    "silu": "SiLU, GELU",
    "gelu": "SiLU, GELU",
    "geglu_quantize": "SiLU, GELU",
    "cat": "cat",
    "interpolate": "upsample",
    **dict.fromkeys(("add", "mul", "div", "sub", "add_", "mul_"), "add, multiply"),
    **dict.fromkeys(("__add__", "__radd__", "__mul__", "__truediv__"), "add, multiply"),
    **dict.fromkeys(("contiguous", "reshape", "clone", "to", "float", "copy_", "flatten"), COPIES),
}


class _Clock(TorchFunctionMode):
    """Seconds and calls by kind, of what runs inside `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._stack: list[tuple[str, bool]] = []  # kind, whether what it calls counts as its own
        self._since = 0.0

    def enter(self, kind: str, whole: bool) -> None:
        self._charge()
        self._stack.append((kind, whole))
        self.calls[kind] += 1

    def leave(self) -> None:
        self._charge()
        self._stack.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1][0]] += now - self._since
        self._since = time.perf_counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = FUNCTIONS.get(getattr(func, "__name__", "").split(".")[0])
        if kind is None or (self._stack and self._stack[-1][1]):
            return func(*args, **(kwargs or {}))
        self.enter(kind, whole=True)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.leave()


def profile(forward: Callable[[], object], model: nn.Module, rounds: int) -> list[dict[str, Any]]:
    """Rows of {kind, ms, calls, share}, the most costly first, then the rest: medians of `rounds`
    forwards. `forward` must run `model`."""
    measured = []
    for _ in range(rounds):
        clock = _Clock()
        with ExitStack() as hooks, clock:
            for module in model.modules():
                for handle in _hooks(module, clock):
                    hooks.callback(handle.remove)
            clock.enter(REST, whole=False)
            forward()
            clock.leave()
        measured.append(clock)
    rows = []
    total = statistics.median(sum(clock.seconds.values()) for clock in measured)
    for kind in measured[0].seconds:
        ms = statistics.median(clock.seconds[kind] for clock in measured) * 1e3
        calls = None if kind == REST else measured[0].calls[kind]
        rows.append({"kind": kind, "ms": ms, "calls": calls, "share": ms / total / 1e3})
    return sorted(rows, key=lambda row: (row["kind"] == REST, -row["ms"]))


def _hooks(module: nn.Module, clock: _Clock) -> list[Any]:
    name = type(module).__name__
    whole = not any(True for _ in module.children())
    kind = MODULES.get(name)
    if kind is None and type(module).__module__.startswith("zo_kernels"):
        kind = name  # one that stands for several of the graph's
    if kind is None:
        return []

    def before(*_: object) -> None:
        clock.enter(kind, whole)

    def after(*_: object) -> None:
        clock.leave()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| kind | ms | share | calls |", "|---|---|---|---|"]
    for row in rows:
        calls = "" if row["calls"] is None else row["calls"]
        lines.append(f"| {row['kind']} | {row['ms']:.1f} | {row['share']:.1%} | {calls} |")
    return "\n".join(lines) + "\n"
