# SPDX-License-Identifier: Apache-2.0
"""The rows of `benchmarks.fewer_forwards` as a table and a chart for the report."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.personal_tables import read_rows, with_error
from benchmarks.timing import machine
from persona.files import write_image, write_json

Row = dict[str, Any]
Point = tuple[float, float]  # pictures through the UNet, figure
LOSSES = ("trained_loss", "held_out_loss")
SHARES = {"a fifth": 1 / 5, "a quarter": 1 / 4, "all": 1.0}  # of the paper's pictures


def reached(curve: Sequence[Point], level: float) -> float | None:
    """Pictures at which a falling curve of (pictures, loss) first meets `level`, linear between its
    points; None: nowhere."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y0 > level >= y1:
            return x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
    return None


def mean_curves(rows: Sequence[Row], figure: str) -> dict[str, list[Point]]:
    """Estimator to (pictures, mean over its subjects and seeds)."""
    points: dict[str, dict[int, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for i, at in enumerate(row["curve"]):
            if figure in at:
                points[row["estimator"]][i].append((at["pictures"], at[figure]))
    return {
        name: [
            (statistics.mean(x for x, _ in values), statistics.mean(y for _, y in values))
            for values in by_point.values()
        ]
        for name, by_point in points.items()
    }


def tables(rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    """Final figures with their spread over seeds, and pictures to the paper's last losses on the
    same subjects and seeds."""
    lines = []
    for name in names:
        own = [row for row in rows if row["estimator"] == name]
        if not own:
            continue
        pairs = _beside_paper(rows, name)
        lines.append(
            [
                name,
                len({row["subject"] for row in own}),
                len({row["seed"] for row in own}),
                *(_over_seeds(own, figure) for figure in (*LOSSES, "fidelity")),
                f"{own[-1]['curve'][-1]['pictures']}",
                *(_needed(pairs, figure) for figure in LOSSES),
            ]
        )
    columns = [
        "estimator",
        "subjects",
        "seeds",
        "trained loss",
        "held-out loss",
        "subject fidelity",
        "pictures",
        "pictures to the paper's last trained loss",
        "to its held-out loss",
    ]
    title = "After the budget: mean over subjects, +- standard deviation over seeds"
    made = [{"title": title, "columns": columns, "rows": lines}]
    return (
        [*made, differences(rows, names), fidelities(rows, names)]
        if _beside_paper(rows, "paper")
        else made
    )


def _needed(pairs: Sequence[tuple[Row, Row]], figure: str) -> str:
    """Pictures with which the mean curve of runs of one estimator meets the last point of that of
    the paper's runs."""
    if not pairs:
        return "-"
    (curve,), (paper,) = (mean_curves(some, figure).values() for some in zip(*pairs, strict=True))
    budget, level = paper[-1]
    needed = budget if curve == paper else reached(curve, level)
    return "not reached" if needed is None else f"{needed:.0f}"


def _beside_paper(rows: Sequence[Row], name: str) -> list[tuple[Row, Row]]:
    """Runs of an estimator, each with the paper's of the same subject and seed."""
    papers = {(r["subject"], r["seed"]): r for r in rows if r["estimator"] == "paper"}
    own = [r for r in rows if r["estimator"] == name]
    return [
        (r, papers[r["subject"], r["seed"]]) for r in own if (r["subject"], r["seed"]) in papers
    ]


def differences(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """Last losses against the paper's, on the pairs of subject and seed that both have."""
    lines = []
    for name in names:
        pairs = _beside_paper(rows, name) if name != "paper" else []
        if pairs:
            cells = [
                with_error([_last(own)[figure] - _last(paper)[figure] for own, paper in pairs], 4)
                for figure in LOSSES
            ]
            lines.append([name, len(pairs), *cells])
    return {
        "title": "Difference to the paper's on the same subjects and seeds, +- standard error",
        "columns": ["estimator", "pairs", "trained loss", "held-out loss"],
        "rows": lines,
    }


def fidelities(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """Likeness of pictures drawn early, less that of the paper's at its end, on the same pairs."""
    budgets = [row["curve"][-1]["pictures"] for row in rows if row["estimator"] == "paper"]
    bounds = [share * max(budgets) for share in SHARES.values()]
    lines = []
    for name in names:
        pairs = _beside_paper(rows, name)
        if pairs:
            lines.append([name, len(pairs), *(_ahead(pairs, bound) for bound in bounds)])
    return {
        "title": "Subject fidelity after a share of the paper's pictures, less the paper's after "
        "all, on the same subjects and seeds, +- standard error",
        "columns": ["estimator", "pairs", *SHARES],
        "rows": lines,
    }


def _last(row: Row) -> dict[str, float]:
    point: dict[str, float] = row["curve"][-1]
    return point


def _ahead(pairs: Sequence[tuple[Row, Row]], bound: float) -> str:
    """Where pictures were drawn with `bound` pictures through the UNet, or the step before."""
    found = []
    for own, paper in pairs:
        near = [at for at in own["curve"] if 0.85 * bound < at["pictures"] <= bound]
        drawn = [at["fidelity"] for at in near if "fidelity" in at]
        if drawn and "fidelity" in _last(paper):
            found.append(drawn[-1] - _last(paper)["fidelity"])
    return with_error(found, 4) if found else "-"


def _over_seeds(rows: Sequence[Row], figure: str) -> str:
    """Mean over subjects of the figure where it was measured last."""
    by_seed = defaultdict(list)
    for row in rows:
        found = [at[figure] for at in row["curve"] if figure in at]
        by_seed[row["seed"]].append(found[-1] if found else float("nan"))
    means = [statistics.mean(values) for values in by_seed.values()]
    spread = f" +- {statistics.stdev(means):.4f}" if len(means) > 1 else ""
    return f"{statistics.mean(means):.4f}{spread}"


def write_tables(out: Path, names: Sequence[str], note: str) -> None:
    """Table and chart of the estimators `names`, beside the rows; nothing where there are none."""
    rows = [row for row in read_rows(out) if row["estimator"] in names]
    if not rows:
        return
    content = {
        "title": "Fewer forwards for textual inversion",
        "command": "python -m benchmarks.fewer_forwards --subjects FILE.npz",
        "machine": machine(),
        "note": " ".join(note.split()),
        "tables": tables(rows, names),
    }
    write_json(out.with_suffix(".json"), content, "out")
    panels = []
    for figure, title in (("trained_loss", "Trained styles"), ("held_out_loss", "Held-out style")):
        curves = mean_curves(rows, figure)
        lines = [charts.Line(name, curves[name][1:]) for name in names if name in curves]
        label = "pictures through the UNet"
        panels.append(charts.Panel(title, label, lines, "denoising loss", log="x"))
    write_image(out.with_suffix(".png"), charts.draw(panels), "out")
