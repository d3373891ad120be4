# SPDX-License-Identifier: Apache-2.0
"""Line charts with logarithmic axes, of which y may be linear, drawn with Pillow alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 520, 400  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 50
FINE = 2  # drawn so many times larger, then scaled down


@dataclass(frozen=True)
class Line:
    """Points (x, y), both positive; others are left out."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Lines over one pair of axes. level: a dashed horizontal line, or None; linear: the y axis."""

    title: str
    x_label: str
    lines: Sequence[Line]
    level: float | None = None
    linear: bool = False


def draw(panels: Sequence[Panel]) -> Image.Image:
    """The panels side by side."""
    sheet = Image.new("RGB", (FINE * WIDTH * max(1, len(panels)), FINE * HEIGHT), "white")
    pen = ImageDraw.Draw(sheet)
    for i, panel in enumerate(panels):
        _draw(pen, panel, FINE * WIDTH * i)
    return sheet.resize((sheet.width // FINE, sheet.height // FINE), Image.Resampling.LANCZOS)


def _draw(pen: ImageDraw.ImageDraw, panel: Panel, offset: int) -> None:
    font = ImageFont.load_default(11 * FINE)
    shown = [_usable(line.points) for line in panel.lines]
    values = [p for points in shown for p in points] or [(1.0, 1.0)]
    levels = [panel.level] if panel.level else []
    x0, x1 = _decades([x for x, _ in values])
    ys = [y for _, y in values] + levels
    y0, y1 = _tenths(ys) if panel.linear else _decades(ys)
    left, right = offset + FINE * LEFT, offset + FINE * (WIDTH - RIGHT)
    top, bottom = FINE * TOP, FINE * (HEIGHT - BOTTOM)

    def at(x: float, y: float) -> tuple[float, float]:
        height = y if panel.linear else math.log10(y)
        return (
            left + (math.log10(x) - x0) / (x1 - x0) * (right - left),
            bottom - (height - y0) / (y1 - y0) * (bottom - top),
        )

    for decade in range(x0, x1 + 1):
        x, _ = at(10.0**decade, 10.0**y0)
        pen.line((x, top, x, bottom), fill="#e4e4e4", width=FINE)
        pen.text((x, bottom + 4 * FINE), f"{10.0**decade:g}", "black", font, anchor="mt")
    if panel.linear:
        ticks = [y0 + (y1 - y0) * i / 5 for i in range(6)]
    else:
        ticks = [10.0**decade for decade in range(int(y0), int(y1) + 1)]
    for tick in ticks:
        _, y = at(10.0**x0, tick)
        pen.line((left, y, right, y), fill="#e4e4e4", width=FINE)
        pen.text((left - 4 * FINE, y), f"{tick:.4g}", "black", font, anchor="rm")
    pen.rectangle((left, top, right, bottom), outline="#888888", width=FINE)
    if panel.level:
        _, y = at(10.0**x0, panel.level)
        for x in range(left, right, 12 * FINE):
            pen.line((x, y, min(x + 6 * FINE, right), y), fill="#444444", width=FINE)
    for i, (line, points) in enumerate(zip(panel.lines, shown, strict=True)):
        places = [at(x, y) for x, y in points]
        pen.line(places, fill=line.color, width=2 * FINE, joint="curve")
        for x, y in places:
            r = 3 * FINE
            pen.ellipse((x - r, y - r, x + r, y + r), fill=line.color)
        row = top + (8 + 15 * i) * FINE
        key = right - 160 * FINE
        pen.line((key, row, key + 20 * FINE, row), fill=line.color, width=2 * FINE)
        pen.text((key + 25 * FINE, row), line.label, "black", font, anchor="lm")
    pen.text((left, top - 8 * FINE), panel.title, "black", font, anchor="ls")
    pen.text(((left + right) / 2, bottom + 24 * FINE), panel.x_label, "black", font, anchor="mt")


def _usable(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [p for p in points if all(0 < v < math.inf for v in p)]


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Exponents of the powers of ten around the values."""
    low = math.floor(math.log10(min(values)))
    return low, max(low + 1, math.ceil(math.log10(max(values))))


def _tenths(values: Sequence[float]) -> tuple[float, float]:
    """A range around the values whose ends are round."""
    step = 10.0 ** math.floor(math.log10(max(max(values) - min(values), 1e-12)))
    low = math.floor(min(values) / step) * step
    return low, max(low + step, math.ceil(max(values) / step) * step)
