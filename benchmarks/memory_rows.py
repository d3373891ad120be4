# SPDX-License-Identifier: Apache-2.0
"""Rows of peaks of memory, each measured in a process of its own, and the file that they fill."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import machine
from persona.files import write_json

Row = dict[str, int]  # what -> bytes


def in_own_process(bench: str, name: str, *arguments: str) -> Row:
    """What ``python -m benchmarks.<bench> --worker <name> <arguments>`` prints in its last line.

    Raises:
        RuntimeError: it failed, such as for want of memory.
    """
    command = [sys.executable, "-m", f"benchmarks.{bench}", "--worker", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{bench}: {name} ended with {done.returncode}: {done.stderr}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def fill(
    out: Path,
    names: Sequence[str],
    row: Callable[[str], Row],
    table: Callable[[dict[str, Row]], dict[str, Any]],
    facts: dict[str, str],
) -> None:
    """Measure `names` anew; rows of others stay. The file is whole after each.

    Args:
        row: name of a case -> its row.
        table: all rows -> what the report shows.
        facts: title, command and note of the file.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Row] = json.loads(out.read_text())["rows"] if out.exists() else {}
    for name in names:
        rows[name] = row(name)
        print(name, {key: f"{value / 1e9:.2f} GB" for key, value in rows[name].items()}, flush=True)
        content = {**facts, "machine": machine(), "rows": rows, "tables": [table(rows)]}
        write_json(out, content, "out")
