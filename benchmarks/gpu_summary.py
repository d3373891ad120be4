# SPDX-License-Identifier: Apache-2.0
"""The table of GPU rows in README.md and RESULTS.md, made from those of `benchmarks.gpu_ops`."""

import json
from pathlib import Path

ROWS = "gpu_ops.json"
BEGIN = "<!-- rows of a GPU: written by python -m benchmarks.report -->\n"
END = "<!-- end of the rows of a GPU -->\n"
NONE = "On a GPU: no row yet. `make gpu-check` on a machine that has one makes them.\n"
HEAD = "| {} | fastest of ours | median ms | of peak | x torch bf16 |\n|---|---|---|---|---|\n"


def text(folder: Path) -> str:
    """Markdown: of each op and shape the fastest row of ours; or that there is none."""
    path = folder / ROWS
    if not path.exists():
        return NONE
    content = json.loads(path.read_text())
    lines = [HEAD.format(content["machine"].get("gpu", "no GPU"))]
    for table in content["tables"]:
        ours = [row for row in table["rows"] if row[1] in ("triton", "cpp")]
        if ours:
            name, _, median, _, _, share, over = min(ours, key=lambda row: float(row[2]))
            lines.append(f"| {table['title']} | {name} | {median} | {share} | {over} |\n")
    return "".join(lines)


def into(document: str, table: str) -> str:
    """`document` with `table` between its marks.

    Raises:
        ValueError: it has no such marks.
    """
    before, mark, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"report: the document must hold the lines {BEGIN!r} and {END!r}")
    return before + BEGIN + table + END + after
