# SPDX-License-Identifier: Apache-2.0
"""The methods that `benchmarks.personalization` compares: how each is trained, in which budget.

A budget counts pictures through the UNet: a forward of a batch of four counts four. Methods by
forward passes alone get `BUDGET` of them. Backpropagation gets a third as many forwards, each with
its backward pass, which costs about two: the same arithmetic. `--full` takes the step counts of the
papers instead.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.personal_subjects import Subject
from persona.config import TextualInversionConfig
from persona.families import StableDiffusion, load_pipeline
from persona.train import textual_inversion
from zo_kernels.quant import QuantConfig

BUDGET = 3000  # pictures through the UNet by forward passes alone
TOKEN = "<subject>"


@dataclass(frozen=True)
class Job:
    """One run: a subject, a seed, and the folders that it may use."""

    subject: Subject
    seed: int
    model: str
    folder: Path


@dataclass(frozen=True)
class Learned:
    """A trained model ready to draw, and what it took.

    Attributes:
        family: the pipeline, in the precision that it was trained in.
        word: what stands for the subject in prompts.
        forwards, backwards: pictures through the UNet, each way.
        result_bytes: of what is kept of the training.
        base: a pipeline before training, to measure the drift of the prior; None: prompts without
            the token cannot have changed, as no weight did.
    """

    family: StableDiffusion
    word: str
    forwards: int
    backwards: int
    result_bytes: int
    base: Callable[[], StableDiffusion] | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: what the table calls it.
        train: (options, job) -> Learned.
        options: of its config at the budget; these and the seed make the run.
        full: changes to them for the papers' step counts.
    """

    title: str
    train: Callable[[dict[str, Any], Job], Learned]
    options: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=dict)

    def resolved(self, scale: float, full: bool) -> dict[str, Any]:
        """The options at `scale` times the budget's steps, or at the papers'."""
        if full:
            return self.options | self.full
        steps = self.options.get("max_train_steps")
        if steps is None:
            return dict(self.options)
        return self.options | {"max_train_steps": max(1, round(steps * scale))}


def base_family(model: str, spec: str | None) -> StableDiffusion:
    """The base model with weights held as `spec` says; None: as loaded."""
    family = StableDiffusion(load_pipeline(model))
    if spec is not None:
        family.quantize(QuantConfig(spec=spec))
    return family


def untrained(options: dict[str, Any], job: Job) -> Learned:
    """The control: the class word itself."""
    return Learned(base_family(job.model, options["spec"]), job.subject.word, 0, 0, 0)


def invert(options: dict[str, Any], job: Job) -> Learned:
    """Textual inversion; the saved file is loaded into a fresh pipeline as other programs do it."""
    config = TextualInversionConfig(
        pretrained_model_name_or_path=job.model,
        train_data_dir=str(job.subject.write(job.folder / "pictures")),
        output_dir=str(job.folder / "out"),
        placeholder_token=TOKEN,
        initializer_token=job.subject.word,
        seed=job.seed,
        checkpointing_steps=10**9,
        num_validation_images=0,
        **options,
    )
    result = textual_inversion(config, prompts=[], progress=False)
    family = StableDiffusion(load_pipeline(job.model))
    family.pipe.load_textual_inversion(str(result.saved.parent), token=TOKEN)
    spec = weight_spec(config)
    if spec is not None:
        family.quantize(QuantConfig(spec=spec))
    return Learned(
        family,
        TOKEN,
        result.forwards * config.train_batch_size,
        0,
        result.saved.stat().st_size,
    )


def weight_spec(config: TextualInversionConfig) -> str | None:
    """The quantization of `zo_kernels.quant` that the options ask for."""
    bits = {"int8": "w8", "int4": "w4"}.get(config.base_precision)
    if bits is None:
        return None
    return bits + ("a8" if config.activation_precision == "int8" else "")


def pictures(options: dict[str, Any]) -> int:
    """Pictures that textual inversion by forward passes takes through the UNet."""
    config = TextualInversionConfig(**options)
    evaluations = 2 * config.zo_n if config.zo_estimator == "two_sided" else config.zo_n + 1
    return config.max_train_steps * evaluations * config.train_batch_size


def _zo(title: str, full: bool = True, **options: Any) -> Method:
    """Textual inversion by forward passes: steps that fit the budget."""
    steps = BUDGET // pictures(options | {"max_train_steps": 1})
    paper = {"max_train_steps": 30_000} if full else {}
    return Method(title, invert, options | {"max_train_steps": steps}, paper)


# ZOODiP as the paper has it: one picture a step, two directions, one-sided.
_PAPER: dict[str, Any] = {}
_DEMO: dict[str, Any] = {
    "train_batch_size": 4,
    "zo_n": 15,
    "zo_eps": 2e-2,
    "learning_rate": 6e-3,
    "adam_epsilon": 1e-8,
    "min_timestep": 400,
    "max_timestep": 1000,
}

METHODS: dict[str, Method] = {
    "base": Method("class word, untrained", untrained, {"spec": "w8"}),
    "zoodip": _zo("ZOODiP, paper", **_PAPER),
    "zoodip-uniform": _zo("ZOODiP, t uniform", min_timestep=0, max_timestep=1000),
    "zoodip-sg-off": _zo("ZOODiP, no Subspace Gradient", zo_subspace="off"),
    "zoodip-sg-random": _zo("ZOODiP, random subspace", zo_subspace="random"),
    "zoodip-spsa": _zo("ZOODiP, two-sided", zo_estimator="two_sided"),
    "zoodip-released": _zo(
        "ZOODiP, released code", zo_normalizer="released-code", learning_rate=1e-2
    ),
    "zoodip-demo": _zo("ZOODiP, the demo's recipe", full=False, **_DEMO),
}


def facts(method: Method, scale: float, full: bool) -> dict[str, Any]:
    """What a row of the method depends on beside subject and seed: all options, defaults too."""
    options = method.resolved(scale, full)
    if method.train is invert:
        config = dataclasses.asdict(TextualInversionConfig(**options))
        for name in ("pretrained_model_name_or_path", "train_data_dir", "output_dir", "seed"):
            config.pop(name)
        options = config
    return {"title": method.title, "options": options}
