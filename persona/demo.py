# SPDX-License-Identifier: Apache-2.0
"""``make demo``: teach the shipped tiny-sd a subject that it never saw; score before and after."""

import argparse
import statistics
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from persona.config import TextualInversionConfig
from persona.errors import UserError
from persona.evaluate import Scorer
from persona.files import make_folder, write_image, write_json
from persona.memory import human
from persona.prompts import STYLES
from persona.report import grid, table
from persona.train import Result, textual_inversion

ASSETS = Path(str(files("persona"))) / "assets"
DEMO_STYLES = STYLES[:3]  # those of the subject's pictures
PICTURES_PER_STYLE = 8
TOKEN = "<lantern>"
# Larger steps than the preset's of one picture each: the subject's three differ in style.
RECIPE: dict[str, Any] = TextualInversionConfig.presets["gauss-newton"] | {
    "pretrained_model_name_or_path": str(ASSETS / "tiny-sd"),
    "train_data_dir": str(ASSETS / "demo"),
    "placeholder_token": TOKEN,
    "initializer_token": "lamp",
    "train_batch_size": 4,
    "min_timestep": 400,
    "max_timestep": 1000,
    "guidance_scale": 3.0,
    "num_inference_steps": 15,
}


def run(seed: int, out: Path, scorer: Scorer, overrides: dict[str, Any]) -> dict[str, Any]:
    """One seed: train, and score the pictures of the same prompts and noise before and after."""
    config = TextualInversionConfig(
        **RECIPE | overrides, seed=seed, output_dir=str(out / f"seed-{seed}")
    )
    styles = [style for style in DEMO_STYLES for _ in range(PICTURES_PER_STYLE)]
    result = textual_inversion(config, prompts=[f"a {style} of a {{}}" for style in styles])
    return {
        "seed": seed,
        "before": _scores(result.before, result, scorer, styles, config),
        "after": _scores(result.after, result, scorer, styles, config),
        "result": result,
    }


def _scores(
    images: list[Image.Image],
    result: Result,
    scorer: Scorer,
    styles: list[str],
    config: TextualInversionConfig,
) -> dict[str, float]:
    features = scorer.features(images)
    references = scorer.features([example.image for example in result.examples])
    return {
        "subject": scorer.subject(features, references),
        "text": scorer.text(features, [config.initializer_token] * len(images)),
        "style": scorer.style_accuracy(features, styles),
    }


def summary(runs: list[dict[str, Any]], names: dict[str, str]) -> str:
    """The table of all seeds, and what it takes for the gain to be more than chance."""
    rows = []
    for r in runs:
        before, after, result = r["before"], r["after"], r["result"]
        rows.append(
            [
                str(r["seed"]),
                *(f"{before[k]:.3f} -> {after[k]:.3f}" for k in ("subject", "text", "style")),
                f"{result.forwards}",
                f"{result.seconds:.0f}",
                human(max(result.peaks.values())),
            ]
        )
    header = ("seed", "subject", "text", "style", "forwards", "seconds", "peak memory")
    lines = [
        table(header, rows),
        f"subject: mean cosine to the subject's pictures ({names['image']}); text: cosine to the "
        f"class word ({names['text']}); style: accuracy. Seconds are of the training alone.",
    ]
    if len(runs) > 1:
        gains = [r["after"]["subject"] - r["before"]["subject"] for r in runs]
        spread = max(
            statistics.stdev(r[when]["subject"] for r in runs) for when in ("before", "after")
        )
        lines.append(
            f"gain in subject score: {min(gains):.3f} to {max(gains):.3f}; spread between seeds "
            f"(standard deviation): {spread:.3f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m persona.demo", description=__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", type=Path, default=Path("out/demo"))
    parser.add_argument("--max_train_steps", type=int, default=80)
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(argv)
    try:
        make_folder(args.output_dir)
        scorer = Scorer.default()
        overrides = {"max_train_steps": args.max_train_steps, "device": args.device}
        runs = [run(seed, args.output_dir, scorer, overrides) for seed in args.seed]
        sheet = args.output_dir / "grid.png"
        write_image(sheet, _grid(runs))
        figures = [{k: v for k, v in r.items() if k != "result"} for r in runs]
        write_json(args.output_dir / "scores.json", {"encoders": scorer.names, "runs": figures})
    except UserError as error:
        print(f"persona.demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("persona.demo: stopped", file=sys.stderr)
        return 130
    print(f"\n{summary(runs, scorer.names)}\npictures: {sheet}")
    return 0


def _grid(runs: list[dict[str, Any]]) -> Image.Image:
    """The subject's pictures, then for each seed a few pictures before and after."""
    rows = [("pictures", [example.image for example in runs[0]["result"].examples])]
    shown = [i * PICTURES_PER_STYLE + j for i in range(len(DEMO_STYLES)) for j in range(3)]
    for r in runs:
        for when in ("before", "after"):
            images = getattr(r["result"], when)
            rows.append((f"{when}\nseed {r['seed']}", [images[i] for i in shown]))
    return grid(rows, cell=96)


if __name__ == "__main__":
    raise SystemExit(main())
