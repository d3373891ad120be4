# SPDX-License-Identifier: Apache-2.0
"""Charts of the report: panels side by side, each of lines or of single named points."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

WIDTH, HEIGHT = 5.6, 4.2  # inches, of a panel
DPI = 100
STYLES = ("-", "--", ":")


@dataclass(frozen=True)
class Line:
    """Points (x, y) under one label; what is not finite is left out, and what is not positive on a
    logarithmic axis. color: None takes the next of the cycle."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str | None = None


@dataclass(frozen=True)
class Panel:
    """Lines over one pair of axes.

    Attributes:
        level: a dashed horizontal line, or None.
        log: axes that are logarithmic: "xy", "x" or "".
        joined: whether points are joined; if not, each line's label stands beside its points.
    """

    title: str
    x_label: str
    lines: Sequence[Line]
    y_label: str = ""
    level: float | None = None
    log: str = "xy"
    joined: bool = True


def draw(panels: Sequence[Panel]) -> Image.Image:
    """The panels side by side."""
    figure = Figure(figsize=(WIDTH * max(1, len(panels)), HEIGHT), dpi=DPI, layout="constrained")
    for i, panel in enumerate(panels):
        _draw(figure.add_subplot(1, len(panels), i + 1), panel)
    memory = io.BytesIO()
    figure.savefig(memory, format="png")
    return Image.open(memory).convert("RGB")


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize="medium")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(color="#e4e4e4")
    for i, line in enumerate(panel.lines):
        points = [p for p in line.points if _usable(p, panel.log)]
        x, y = [p[0] for p in points], [p[1] for p in points]
        if panel.joined:
            style = STYLES[i // 10 % len(STYLES)]  # colours repeat after ten lines
            axes.plot(x, y, style, marker="o", markersize=4, color=line.color, label=line.label)
            continue
        axes.scatter(x, y, color=line.color)
        for point in points:
            axes.annotate(line.label, point, (4, 3), textcoords="offset points", fontsize="x-small")
    if panel.level is not None:
        axes.axhline(panel.level, color="#444444", linestyle="--")
    if "x" in panel.log:
        axes.set_xscale("log")
    if "y" in panel.log:
        axes.set_yscale("log")
    if panel.joined and panel.lines:
        many = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(panel.lines) > 8 else {}
        axes.legend(fontsize="x-small", **many)


def _usable(point: tuple[float, float], log: str) -> bool:
    logarithmic = ("x" in log, "y" in log)
    return all(
        math.isfinite(v) and (v > 0 or not log) for v, log in zip(point, logarithmic, strict=True)
    )
