# SPDX-License-Identifier: Apache-2.0
"""A whole run of a method: model in, files out."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import zo_kernels
from persona import checkpoint
from persona.base import open_base
from persona.config import RunConfig, TextualInversionConfig
from persona.data import Example, load_folder
from persona.errors import UserError
from persona.families import StableDiffusion
from persona.files import make_folder, write_image, write_json
from persona.memory import (
    blocks_of_small_kept,
    give_back_large_blocks,
    human,
    peak_bytes,
    peak_of,
    trim_all,
)
from persona.methods._method import Method
from persona.methods.textual_inversion import TextualInversion
from persona.plan import keep_budget
from persona.report import MetricsLog, grid

CHECKPOINT = "checkpoint.safetensors"
SMOOTHING = 0.98  # of the loss shown in the progress bar


@dataclass(frozen=True)
class Result:
    """A finished run. ``saved`` is what other programs load; ``before`` and ``after`` are pictures
    of the same prompts and seeds; ``peaks`` has the bytes at the highest point of each part of the
    run, of the whole process on the CPU, of torch on CUDA."""

    examples: list[Example]
    output: Path
    saved: Path
    steps: int
    forwards: int
    rejected: int
    seconds: float
    peaks: dict[str, int]
    before: list[Image.Image]
    after: list[Image.Image]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the checkpoint is written; ``step`` steps are finished."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(f"stopped after step {step}; go on with --resume (state: {path})")


def train(
    method_class: type[Method],
    config: RunConfig,
    *,
    prompts: list[str] | None = None,
    progress: bool = True,
) -> Result:
    """Teach the model of ``config`` the subject of a folder of pictures.

    Writes into ``config.output_dir``: what the method saves, ``grid.png`` (pictures, before,
    after), ``metrics.jsonl``, ``config.json`` and a checkpoint.

    Args:
        method_class: how.
        config: options; of the class that the method takes.
        prompts: of the pictures before and after, ``{}`` standing for the subject; default:
            ``config.validation_prompt``, ``config.num_validation_images`` times.
        progress: show a progress bar.

    Raises:
        UserError: an option, a picture, the model or the output folder is not usable, or the run
            would hold, or holds in training, more than ``config.memory_budget``.
        Interrupted: SIGINT came; the run can be resumed.
    """
    config.require("pretrained_model_name_or_path", "train_data_dir", "initializer_token")
    make_folder(config.output)
    checkpoint_file = config.output / CHECKPOINT
    state = None
    if config.resume_from_checkpoint:
        state = checkpoint.load(checkpoint_file, config.recipe())

    give_back_large_blocks()
    keep_budget(method_class, config)
    family = open_base(config)
    examples = load_folder(
        Path(config.train_data_dir),
        resolution=config.resolution or family.resolution,
        learnable_property=config.learnable_property,
        center_crop=config.center_crop,
    )
    peaks: dict[str, int] = {}
    with _part_of_run("loading", peaks, family):
        method = method_class(family, config, examples)
        family.need("text_encoder", "unet")
    shown = _validation_prompts(config, prompts)
    with _part_of_run("pictures before", peaks, family):
        before = _latents(family, config, shown)
    if state:
        method.load_state_dict(state[0])

    write_json(config.output / "config.json", dataclasses.asdict(config) | _versions())
    started = time.monotonic()
    with _part_of_run("training", peaks, family), blocks_of_small_kept(family.unet):
        _train(method, config, checkpoint_file, progress)
    seconds = time.monotonic() - started

    saved = method.save(config.output)
    with _part_of_run("pictures after", peaks, family):
        after = _latents(family, config, shown)
    counts = {name: getattr(method, name) for name in ("steps", "forwards", "rejected")}
    # The VAE's activations are as large as the UNet: they take turns. A method holds both models.
    del method
    family.release("text_encoder", "unet")
    with _part_of_run("decoding", peaks, family):
        drawn = {
            when: family.decode(latents) if latents is not None else []
            for when, latents in (("before", before), ("after", after))
        }
    if shown:
        rows = [("pictures", [e.image for e in examples]), *drawn.items()]
        write_image(config.output / "grid.png", grid(rows))
    return Result(
        examples=examples,
        output=config.output,
        saved=saved,
        seconds=seconds,
        peaks=peaks,
        before=drawn["before"],
        after=drawn["after"],
        **counts,
    )


def textual_inversion(
    config: TextualInversionConfig,
    *,
    prompts: list[str] | None = None,
    progress: bool = True,
) -> Result:
    """`train`: learn ``config.placeholder_token``, by forward passes or as `config` says.

    ``Result.saved`` is ``learned_embeds.safetensors``; its twin for other programs lies beside it.
    """
    return train(TextualInversion, config, prompts=prompts, progress=progress)


def _train(method: Method, config: RunConfig, saved: Path, progress: bool) -> None:
    metrics = MetricsLog(config.output / "metrics.jsonl", keep_below=method.steps + 1)

    def save() -> None:
        checkpoint.save(saved, method.state_dict(), method.steps, config.recipe())

    bar = tqdm(
        total=config.max_train_steps, initial=method.steps, desc="Steps", disable=not progress
    )
    smooth = math.nan
    with bar, _deferred_interrupt() as interrupted:
        for step in method.run():
            if math.isfinite(step.loss):
                last = step.loss if math.isnan(smooth) else smooth
                smooth = SMOOTHING * last + (1 - SMOOTHING) * step.loss
            memory = peak_bytes(method.family.device)
            metrics.write(
                step=step.step,
                loss=step.loss,
                lr=config.rate,
                forwards=step.forwards,
                rejected=step.rejected,
                peak_bytes=memory,
                **step.more,
            )
            rate = {} if config.rate is None else {"lr": config.rate}
            bar.set_postfix(loss=f"{smooth:.4f}", **rate, mem=human(memory), refresh=False)
            bar.update()
            if step.step % config.checkpointing_steps == 0:
                save()
            if interrupted():
                save()
                raise Interrupted(saved, step.step)
            if config.budget is not None and memory > config.budget:
                save()
                raise UserError(
                    f"memory_budget: must be at least the {human(memory)} that the run has held, "
                    f"got {config.memory_budget}; raise it and go on with --resume (state: {saved})"
                )
    save()


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let a SIGINT wait for the end of a step, with the state whole; a second one acts at once."""
    seen = False

    def handler(number: int, frame: object) -> None:
        nonlocal seen
        seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread: Ctrl-C is somebody else's business
        yield lambda: False
        return
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, previous)


def _validation_prompts(config: RunConfig, prompts: list[str] | None) -> list[str]:
    if prompts is None:
        prompts = [config.validation_prompt or "a photo of a {}"] * config.num_validation_images
    # The pipeline itself writes a token of several vectors out.
    return [p.replace("{}", config.subject) for p in prompts]


def _latents(family: StableDiffusion, config: RunConfig, prompts: list[str]) -> Tensor | None:
    """Of pictures of the prompts; decoded they are when all else is done."""
    if not prompts:
        return None
    return family.sample_latents(
        prompts,
        seed=config.seed,
        steps=config.num_inference_steps,
        guidance=config.guidance_scale,
    )


@contextmanager
def _part_of_run(name: str, peaks: dict[str, int], family: StableDiffusion) -> Iterator[None]:
    """The block, its peak noted in ``peaks``."""
    with peak_of(family.device) as peak:
        yield
    peaks[name] = peak.bytes
    trim_all(family.device)


def _versions() -> dict[str, str]:
    return {"zo_kernels": zo_kernels.__version__, "torch": torch.__version__}
