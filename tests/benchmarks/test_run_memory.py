# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.run_memory`: a run in a process of its own, on a small model of the same make."""

import json
import sys

import pytest

from benchmarks import run_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_every_part_of_a_run_has_a_row(tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert run_memory.main(["--size", "tiny", "--cases", "int4", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    at = written["rows"]["int4"]
    assert set(at) == {"imported", *run_memory.PARTS, "planned"}
    assert all(at[part] >= at["imported"] > 0 for part in run_memory.PARTS)
    [line] = written["tables"][0]["rows"]
    assert line[0] == "int4" and line[-2] == max(line[1:-1], key=float)
    highest, told = max(at[part] for part in run_memory.PARTS), at["imported"] + at["planned"]
    assert 0.9 * highest < told < 1.5 * highest


def test_unknown_cases_are_told(tmp_path, capsys):
    assert run_memory.main(["--cases", "int3", "--out", str(tmp_path / "rows.json")]) == 2
    assert capsys.readouterr().err.startswith("error: cases: must be among int8, int4, ")
