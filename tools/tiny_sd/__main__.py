# SPDX-License-Identifier: Apache-2.0
"""Train tiny-sd, or continue from shipped weights: ``python -m tools.tiny_sd --data FOLDER``.

Stages: vae, text (contrastive), unet (with the text encoder), export. Each resumes from its own
checkpoint in ``--work``; a stage whose minutes are spent is skipped. ``--start`` continues from a
model folder instead of random weights, which is how a later day makes the base better.
"""

import argparse
import os
from pathlib import Path

import torch

from . import data, stages


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_sd", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train.npz and train.jsonl"
    )
    parser.add_argument("--work", type=Path, default=Path("build/tiny-sd"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=Path("persona/assets/tiny-sd"))
    parser.add_argument("--start", type=Path, help="model folder to continue from")
    parser.add_argument("--vae_minutes", type=float, default=15.0)
    parser.add_argument("--text_minutes", type=float, default=8.0)
    parser.add_argument("--unet_minutes", type=float, default=90.0)
    parser.add_argument(
        "--tune_text", action="store_true", help="train the text encoder with the UNet"
    )
    parser.add_argument("--stages", nargs="+", default=list(stages.STAGES), choices=stages.STAGES)
    args = parser.parse_args()
    torch.manual_seed(0)
    # Before any thread exists, so that all inherit it: denormals made a step 5 times slower.
    torch.set_flush_denormal(True)
    pictures = data.load(args.data)
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.stages:
        stages.STAGES[name](args, pictures)


# glibc gives every large activation back to the kernel; keeping them is 2 to 3 times faster on
# CPUs.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}

if __name__ == "__main__":
    if not KEEP_MEMORY.keys() <= os.environ.keys():
        import sys

        os.execve(sys.executable, sys.orig_argv, os.environ | KEEP_MEMORY)
    main()
