# SPDX-License-Identifier: Apache-2.0
"""``make demo``: teach the shipped tiny-sd a subject that it never saw, and measure before and after."""

import argparse
import statistics
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from PIL import Image

from persona.config import TextualInversionConfig
from persona.errors import UserError
from persona.evaluate import Scorer
from persona.files import write_image, write_json
from persona.memory import human
from persona.prompts import STYLES
from persona.report import grid, table
from persona.train import Result, textual_inversion

ASSETS = Path(str(files("persona"))) / "assets"
PICTURES_PER_STYLE = 4
DEMO_STYLES = STYLES[:3]
CONFIG = dict(
    pretrained_model_name_or_path=str(ASSETS / "tiny-sd"),
    train_data_dir=str(ASSETS / "demo"),
    placeholder_token="<subject>",
)


def run(seed: int, out: Path, scorer: Scorer, overrides: dict) -> dict:
    """One seed: train, score the pictures before and after, return the figures."""
    config = TextualInversionConfig(
        **CONFIG | overrides, seed=seed, output_dir=str(out / f"seed-{seed}")
    )
    prompts = [f"a {style} of a {{}}" for style in DEMO_STYLES for _ in range(PICTURES_PER_STYLE)]
    result = textual_inversion(config, prompts=prompts)
    return {"seed": seed, "result": result} | _scores(result, scorer)


def _scores(result: Result, scorer: Scorer) -> dict:
    raise NotImplementedError
