# SPDX-License-Identifier: Apache-2.0
"""Runs of textual inversion that share their forward passes.

A step of one small picture spends most of its time on what does not depend on how many there are.
Runs of one recipe on one frozen model need the same forward at the same time: each draws its own
pictures and makes its own probes, and one batch holds them all. A run learns what it would alone,
up to the rounding of kernels that add up in another order for another batch.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch

from persona.batches import Batch, predict_copies
from persona.methods.textual_inversion import TextualInversion

PICTURES = 64  # in a forward; more would take memory and no time less
T = TypeVar("T")


def step(runs: Sequence[TextualInversion]) -> None:
    """One step by forward passes of each run: all of one recipe and model, each with a token of its
    own."""
    with torch.inference_mode(), ExitStack() as copies:
        batches = [run.draw() for run in runs]
        together = Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
        count = 0
        for run in runs:
            probes = run.probes()
            count = len(probes)
            copies.enter_context(run.hook.copies(probes.to(run.family.device)))
        predicted, target = predict_copies(runs[0].family, together, count)
        shares = predicted.chunk(len(runs), dim=1), target.chunk(len(runs))  # each [Q, B, C, h, w]
        for run, own, wanted in zip(runs, *shares, strict=True):
            run.learn(own, wanted)


def groups(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """So many at a time."""
    return [items[first : first + size] for first in range(0, len(items), size)]
