# SPDX-License-Identifier: Apache-2.0
"""The rows of `benchmarks.personalization` as tables and a grid of pictures for the report."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import charts
from benchmarks.personal_subjects import Subject
from benchmarks.timing import machine
from persona.files import write_image, write_json
from persona.report import grid

SHOWN = 8  # subjects in the grid of pictures
PLOTTED = 0.25  # of the class word's subjects that a method must have for its point

HOW_TO_READ = (
    "Two styles of a subject are trained on, pictures of the third are generated and scored "
    "against the true one. Subject: cosine to the true picture of the held-out style; retrieval@1: "
    "how often that picture is the nearest among all subjects' pictures of this style. Text and "
    "style: cosine to the caption with the class word, and accuracy, over prompts with styles "
    "and colours that training never showed. Alike: mean cosine of two pictures of one prompt "
    "(lower is more diverse). Drift: 1 - cosine, and root-mean-square distance, of pictures of the "
    "class word without the token, before and after, from the same noise. Forwards and backwards "
    "count pictures through the UNet. Encoders: {encoders}."
)
COLUMNS = {  # figure -> what the table calls it
    "fidelity": "subject",
    "retrieval": "retrieval@1",
    "trained_fidelity": "subject, trained styles",
    "trained_retrieval": "retrieval@1, trained styles",
    "text": "text",
    "style": "style",
    "alike": "alike",
    "drift": "drift",
    "drift_pixels": "drift, pixels",
    "forwards": "forwards",
    "backwards": "backwards",
    "cpu_seconds": "CPU seconds",
    "bytes": "bytes",
}
# What each method is held against, where it has rows; PEQA: the baseline of S1, S2 and TuneQDM.
COMPARED = ("base", "ti-backprop", "peqa-bp")
COUNTS = ("forwards", "backwards", "cpu_seconds", "bytes")  # a mean says it all


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of the file; a line torn by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def summary(rows: Sequence[dict[str, Any]], titles: dict[str, str]) -> dict[str, Any]:
    """Mean and spread of every figure, a line a method.

    A figure is averaged over a subject's seeds, then over subjects; the spread is the standard
    deviation over seeds of the mean over those subjects that have all of them.
    """
    by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(row)
    order = [name for name in titles if name in by_method]
    lines = []
    for name in order:
        own = by_method[name]
        subjects, seeds = {r["subject"] for r in own}, {r["seed"] for r in own}
        cells = [_cell(own, figure) for figure in COLUMNS]
        lines.append([titles[name], len(subjects), len(seeds), *cells])
    return {
        "title": "Mean over subjects, +- standard deviation over seeds (subjects that have all)",
        "columns": ["method", "subjects", "seeds", *COLUMNS.values()],
        "rows": lines,
    }


def gains(rows: Sequence[dict[str, Any]], titles: dict[str, str], to: str) -> dict[str, Any]:
    """Each method against the method `to`, on the pairs of subject and seed that both have."""
    figures = ("fidelity", "retrieval", "trained_fidelity", "text", "style")
    lines = []
    for name, title in titles.items():
        own = _pairs(rows, name, to)
        if name == to or not own:
            continue
        means = [_by_subject(own, figure) for figure in figures]
        lines.append([title, len(own), *(with_error(m, 3) if m else "-" for m in means)])
    return {
        "title": f"Difference to {titles[to]} on the same subjects and seeds, +- standard error",
        "columns": ["method", "pairs", *(COLUMNS[f] for f in figures)],
        "rows": lines,
    }


Pair = tuple[dict[str, Any], dict[str, Any]]  # a row, and the other method's of subject and seed


def _pairs(rows: Sequence[dict[str, Any]], name: str, to: str) -> list[Pair]:
    others = {(r["subject"], r["seed"]): r for r in rows if r["method"] == to}
    own = [r for r in rows if r["method"] == name]
    return [(r, others[place]) for r in own if (place := (r["subject"], r["seed"])) in others]


def _by_subject(pairs: Sequence[Pair], figure: str) -> list[float]:
    """The mean difference of each subject whose rows have the figure."""
    differences = defaultdict(list)
    for own, other in pairs:
        if figure in own:
            differences[own["subject"]].append(own[figure] - other[figure])
    return [statistics.mean(d) for d in differences.values()]


def with_error(differences: Sequence[float], digits: int) -> str:
    """Mean, its sign shown, and the standard error where there are several: "+0.012 +- 0.003"."""
    mean = f"{statistics.mean(differences):+.{digits}f}"
    if len(differences) == 1:
        return mean
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean} +- {error:.{digits}f}"


def _cell(rows: Sequence[dict[str, Any]], figure: str) -> str:
    by_subject: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if figure in row:
            by_subject[row["subject"]][row["seed"]] = row[figure]
    if not by_subject:
        return "-"
    mean = statistics.mean(statistics.mean(own.values()) for own in by_subject.values())
    if figure in COUNTS:
        return f"{mean:.0f}"
    seeds = {seed for own in by_subject.values() for seed in own}
    whole = [own for own in by_subject.values() if len(own) == len(seeds)]
    if len(seeds) == 1 or not whole:
        return f"{mean:.3f}"
    means = [statistics.mean(own[seed] for own in whole) for seed in seeds]
    return f"{mean:.3f} +- {statistics.stdev(means):.3f}"


def write(
    out: Path, rows: Sequence[dict[str, Any]], titles: dict[str, str], encoders: dict[str, str]
) -> None:
    """The tables of `rows`, as JSON beside the file `out` that has them."""
    tables = [summary(rows, titles)]
    for other in COMPARED:
        if any(row["method"] == other for row in rows):
            tables.append(gains(rows, titles, other))
    named = ", ".join(f"{name} ({kind}s)" for kind, name in encoders.items())
    content = {
        "title": "Personalization, method by method",
        "command": "python -m benchmarks.personalization --subjects FILE.npz",
        "machine": machine(),
        "note": HOW_TO_READ.format(encoders=named),
        "tables": tables,
    }
    write_json(out.with_suffix(".json"), content, "out")


def write_trade(out: Path, rows: Sequence[dict[str, Any]], titles: dict[str, str]) -> None:
    """Likeness to the subject against what the prompt asks beside it, a point a method: its mean
    difference to the untrained class word on the same subjects and seeds. Methods with few subjects
    are left out."""
    drawn = [row for row in rows if "style" in row]
    pairs = {name: _pairs(drawn, name, "base") for name in titles}
    counts = {name: len({row["subject"] for row, _ in own}) for name, own in pairs.items()}
    shown = [name for name in titles if counts[name] >= PLOTTED * counts.get("base", 0) > 0]
    if not shown:
        return
    panels = []
    for figure in ("style", "text"):
        lines = [
            charts.Line(
                titles[name], [(_mean(pairs[name], figure), _mean(pairs[name], "fidelity"))]
            )
            for name in shown
        ]
        label = f"{COLUMNS[figure]}, over prompts that training never showed"
        title = "Subject against prompt, above the untrained class word"
        panels.append(charts.Panel(title, label, lines, COLUMNS["fidelity"], log="", joined=False))
    write_image(out.with_name(f"{out.stem}-trade.png"), charts.draw(panels), "out")


def _mean(pairs: Sequence[Pair], figure: str) -> float:
    return statistics.mean(_by_subject(pairs, figure))


def write_grid(
    out: Path,
    rows: Sequence[dict[str, Any]],
    titles: dict[str, str],
    subjects: Sequence[Subject],
    pictures: Path,
    size: int = 64,
) -> None:
    """The first held-out picture of every method: a line a method, a column a subject.

    All are of the seed that has most pictures, of the subjects that most methods have drawn. A
    method without one of them has no line; where its row is there and its picture is not, having
    been drawn elsewhere, an older grid is left as it is.
    """
    seeds: dict[int, dict[tuple[str, str], Path]] = defaultdict(dict)
    for row in rows:
        if row["method"] in titles:
            path = pictures / f"{row['key']}.png"
            seeds[row["seed"]][row["method"], row["subject"]] = path
    drawn = {seed: {k for k, path in of.items() if path.exists()} for seed, of in seeds.items()}
    if not any(drawn.values()):
        return
    best = max(drawn, key=lambda seed: len(drawn[seed]))
    counts = Counter(subject for _, subject in drawn[best])
    shown = sorted(subjects, key=lambda s: -counts[s.name])[: min(SHOWN, len(counts))]
    lines = [("true", [s.pictures[s.held_out] for s in shown])]
    for style in dict.fromkeys(style for s in shown for style in s.trained):
        lines.append((f"trained:\n{style}", [s.pictures[style] for s in shown]))
    for name, title in titles.items():
        keys = {(name, s.name) for s in shown}
        if keys <= drawn[best]:
            paths = [seeds[best][name, s.name] for s in shown]
            images = [Image.open(path).convert("RGB") for path in paths]
            lines.append((title.replace(", ", ",\n").replace(" by ", "\nby "), images))
        elif keys <= seeds[best].keys() and out.with_suffix(".png").exists():
            return
    write_image(out.with_suffix(".png"), grid(lines, cell=size), "out")
