# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import asdict

import pytest

from benchmarks import gpu_summary, report
from benchmarks.integer_ops import OpRow


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def rows_of(*names):
    return [asdict(OpRow(n, "cpp", 2.0, 1.0, 3.0, 0.5, 0.4, 1e-2)) for n in names]


def test_every_table_names_its_command(tmp_path):
    group = {"title": "linear", "kind": "linear", "disturbed": 0.0, "rows": rows_of("w8a8", "w4a8")}
    write(tmp_path, "integer_ops.json", {"command": "python -m x --y", "groups": [group]})
    table = {"title": "t", "columns": ["a", "b"], "rows": [["x", 1.5]]}
    content = {
        "title": "Mine",
        "command": "python -m z",
        "machine": {"cpu": "c"},
        "tables": [table],
    }
    write(tmp_path, "mine.json", content)
    (tmp_path / "mine.png").touch()
    out = tmp_path / "RESULTS.md"
    arguments = ["--results", str(tmp_path), "--out", str(out)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = out.read_text()
    for part in (
        "    python -m x --y",
        "| linear | 40% |",
        "## Mine",
        "    python -m z",
        "| x | 1.5 |",
    ):
        assert part in text
    assert "Machine: cpu c." in text
    assert "![Mine](results/mine.png)" in text


@pytest.mark.parametrize(
    "content, said",
    [({"command": "c", "values": 1}, "must hold"), ({"tables": []}, "must name its command")],
)
def test_unknown_rows_are_refused(tmp_path, capsys, content, said):
    write(tmp_path, "odd.json", content)
    out = tmp_path / "RESULTS.md"
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_the_kept_rows_are_shown():
    paths = sorted(report.RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        assert report.section(path).startswith("## ")


def test_the_table_of_a_gpu(tmp_path):
    assert gpu_summary.text(tmp_path) == gpu_summary.NONE
    rows = [
        ["w8a8", "triton", "2.0", "", "", "60% of int8", "1.50"],
        ["w4a8", "triton", "1.5", "", "", "80% of int8", "2.00"],
        ["torch bf16", "torch", "3.0", "", "", "90% of bf16", "1.00"],
        ["gemlite", "not installed", "", "", "", "", ""],
    ]
    table = {"title": "qlinear, here", "columns": [], "rows": rows}
    write(tmp_path, gpu_summary.ROWS, {"machine": {"gpu": "one"}, "tables": [table]})
    text = gpu_summary.text(tmp_path)
    assert text.startswith("| one |") and text.endswith(
        "| qlinear, here | w4a8 | 1.5 | 80% of int8 | 2.00 |\n"
    )
    document = f"a\n{gpu_summary.BEGIN}old\n{gpu_summary.END}b\n"
    assert gpu_summary.into(document, text) == document.replace("old\n", text)
    with pytest.raises(ValueError, match="must hold the lines"):
        gpu_summary.into("a", text)
