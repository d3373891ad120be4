# SPDX-License-Identifier: Apache-2.0
"""What a run shows: metrics.jsonl, a grid of pictures, a small table."""

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from persona.files import append_text, write_text


class MetricsLog:
    """``metrics.jsonl``: one object a step, appended; a resumed run first drops later steps.

    Args:
        path: the file.
        keep_below: lines with ``step`` below this stay, later or torn ones go.
    """

    def __init__(self, path: Path, keep_below: int) -> None:
        kept = [line for line in _lines(path) if line["step"] < keep_below]
        write_text(path, "".join(json.dumps(x) + "\n" for x in kept))
        self._path = path

    def write(self, **values: Any) -> None:
        """Add a line; numbers that are not finite, which JSON does not have, become null.

        Raises:
            UserError: the disk is full or refuses; the lines so far stay whole.
        """
        known = {
            k: None if isinstance(v, float) and not isfinite(v) else v for k, v in values.items()
        }
        append_text(self._path, json.dumps(known) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break  # torn by a crash
    return out


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], cell: int = 128) -> Image.Image:
    """Labelled rows of pictures, each ``cell`` pixels a side."""
    label, gap = 90, 4
    columns = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (label + columns * (cell + gap), len(rows) * (cell + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (name, images) in enumerate(rows):
        top = y * (cell + gap)
        draw.multiline_text((4, top + cell // 2 - 8), name, fill="black")
        for x, image in enumerate(images):
            scaled = image.resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(scaled, (label + x * (cell + gap), top))
    return sheet


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown with aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
