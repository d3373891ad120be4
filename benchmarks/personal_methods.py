# SPDX-License-Identifier: Apache-2.0
"""The methods that `benchmarks.personalization` compares: how each is trained, in which budget.

A budget counts pictures through the UNet: a forward of a batch of four counts four. Methods by
forward passes alone get `BUDGET` of them. Backpropagation gets a third as many forwards, each with
its backward pass, which costs about two: the same arithmetic. `--full` takes the step counts of the
papers instead. A budget is a hundredth of those, so learning rates are ours, chosen at it by the
denoising loss of one subject; where a paper's preset is named, its learning rate stands.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.personal_subjects import Subject
from persona.base import load_base
from persona.cli import COMMANDS, load_method
from persona.config import RunConfig, TextualInversionConfig
from persona.data import load_folder
from persona.families import StableDiffusion
from persona.files import make_folder

BUDGET = 768  # pictures through the UNet by forward passes alone
TOKEN = "<subject>"  # of textual inversion
# Of the others: one token, harmless to the untrained tiny-sd. "sks" is two, and its loss with them
# is 6 % higher than without; methods would first of all unlearn that.
RARE_WORD = "k"


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


def make_config(options: dict[str, Any], **more: Any) -> RunConfig:
    """The config of `options`, whose "command" is the subcommand of ``persona``; on the CPU,
    where rows count its seconds."""
    given = dict(options)
    command = COMMANDS[given.pop("command")]
    ti = command.config is TextualInversionConfig
    given["placeholder_token"] = TOKEN if ti else RARE_WORD
    return command.config(**given | {"device": "cpu"} | more)


def untrained(options: dict[str, Any], job: Job) -> Learned:
    """The control: the class word itself."""
    config = RunConfig(pretrained_model_name_or_path=job.model, device="cpu", **options)
    family = load_base(config)
    return Learned(family, job.subject.word, 0, 0, 0)


def learn(options: dict[str, Any], job: Job) -> Learned:
    """A method of ``persona``, as `persona.train.train` runs it, less its files but the result."""
    config = make_config(
        options,
        pretrained_model_name_or_path=job.model,
        train_data_dir=str(job.subject.write(job.folder / "pictures")),
        output_dir=str(job.folder / "out"),
        initializer_token=job.subject.word,
        seed=job.seed,
    )
    family = load_base(config)
    examples = load_folder(
        Path(config.train_data_dir),
        resolution=config.resolution or family.resolution,
        learnable_property=config.learnable_property,
    )
    method = load_method(COMMANDS[config.command].method)(family, config, examples)
    for _ in method.run():
        pass
    make_folder(config.output)
    saved = method.save(config.output)
    files = [saved] if saved.is_file() else [f for f in saved.rglob("*") if f.is_file()]
    pictures = method.forwards * config.train_batch_size
    return Learned(
        family,
        config.subject,
        pictures,
        _backwards(method, config, pictures),
        sum(file.stat().st_size for file in files),
        None if config.command == "ti" else lambda: load_base(config),
    )


def by_backpropagation(config: RunConfig) -> bool:
    return getattr(config, "optimizer", "bp") == "bp"


def _backwards(method: Any, config: RunConfig, pictures: int) -> int:
    """Pictures that went back through the UNet, too."""
    counts = getattr(method, "counts", None)  # of selective optimization: kind of step -> steps
    if counts is not None:
        return config.train_batch_size * sum(n for kind, n in counts.items() if kind[:2] == "bp")
    return pictures if by_backpropagation(config) else 0


def pictures_a_step(options: dict[str, Any]) -> int:
    """Pictures through the UNet, forwards only."""
    config: Any = make_config(options)
    evaluations = 1
    if not by_backpropagation(config):
        two = getattr(config, "zo_estimator", "two_sided") == "two_sided"
        evaluations = 2 * config.zo_n if two else config.zo_n + 1
    return evaluations * config.train_batch_size


def budgeted(title: str, command: str, full: int | None = None, **options: Any) -> Method:
    """A method of ``persona`` with the steps of its budget; `full`: those of its paper."""
    options = {"command": command, **options}
    budget = BUDGET // 3 if by_backpropagation(make_config(options)) else BUDGET
    steps = {"max_train_steps": budget // pictures_a_step(options)}
    return Method(title, learn, options | steps, {"max_train_steps": full} if full else {})


_PICTURES = 4  # a step of backpropagation


def _ti(title: str, preset: str = "paper", **options: Any) -> Method:
    recipe = TextualInversionConfig.presets[preset] | options
    full = recipe.pop("max_train_steps", 30_000)
    return budgeted(title, "ti", full, **recipe)


def _scales(title: str, **options: Any) -> Method:
    return budgeted(title, "scales", 400, train_batch_size=_PICTURES, **options)


def _zo_scales(title: str, **options: Any) -> Method:
    recipe = _ZO_SCALES | options
    return budgeted(f"{title}, zeroth order", "scales", 4000, optimizer="zo", **recipe)


def _selective(title: str, **options: Any) -> Method:
    """As many steps as backpropagation at the high resolution has: none of its costs more."""
    return budgeted(title, "selective", 1000, train_batch_size=_PICTURES, **options)


# One two-sided direction; and that, shaped by the vocabulary.
SMALL: dict[str, Any] = {"zo_n": 1, "zo_estimator": "two_sided", "zo_subspace": "off"}
WORDS = SMALL | {"zo_space": "vocabulary", "learning_rate": 1e-2}
# Where many directions share a step, a wide radius is above the rounding of int8 activations.
_ZO_SCALES: dict[str, Any] = {
    "zo_n": 8,
    "zo_eps": 3e-2,
    "learning_rate": 0.3,
    "activation_precision": "int8",
}
# Int8 activations, for which many directions and pictures a step suffice.
_WIDE: dict[str, Any] = {
    "train_batch_size": 4,
    "zo_n": 15,
    "zo_eps": 2e-2,
    "learning_rate": 6e-3,
    "activation_precision": "int8",
    "min_timestep": 400,
    "max_timestep": 1000,
}

METHODS: dict[str, Method] = {
    "base": Method("class word, untrained", untrained, {"base_precision": "int8"}),
    "ti-backprop": _ti(
        "textual inversion by backpropagation", "backprop", train_batch_size=_PICTURES
    ),
    "zoodip": _ti("ZOODiP, paper"),
    "zoodip-released": _ti("ZOODiP, released code", "released-code"),
    "zoodip-uniform": _ti("ZOODiP, t uniform", min_timestep=0, max_timestep=1000),
    "zoodip-sg-off": _ti("ZOODiP, no Subspace Gradient", zo_subspace="off"),
    "zoodip-sg-random": _ti("ZOODiP, random subspace", zo_subspace="random"),
    "zoodip-sg-centred": _ti("ZOODiP, subspace not standardized", zo_subspace="centred"),
    "zoodip-n1": _ti("ZOODiP, n = 1", zo_n=1),
    "zoodip-n4": _ti("ZOODiP, n = 4", zo_n=4),
    "zoodip-n8": _ti("ZOODiP, n = 8", zo_n=8),
    "zoodip-two-sided": _ti("ZOODiP, two-sided", zo_estimator="two_sided"),
    "zoodip-one-point": _ti("ZOODiP, one-point", zo_estimator="one_point"),
    "zoodip-int4": _ti("ZOODiP, int4", base_precision="int4", zo_eps=1e-2),
    "zoodip-wide": _ti("ZOODiP, fifteen directions, four pictures, int8", **_WIDE),
    "ti-gauss-newton": _ti("textual inversion by Gauss-Newton", "gauss-newton"),
    "zoodip-words": _ti("ZOODiP, directions as words differ", **WORDS),
    "peqa-bp": _scales("PEQA"),
    "peqa-zo": _zo_scales("PEQA"),
    "s1-bp": _scales("S1", method="s1"),
    "s1-zo": _zo_scales("S1", method="s1"),
    "s2-bp": _scales("S2", method="s2"),
    "s2-zo": _zo_scales("S2", method="s2"),
    "tuneqdm-bp": _scales("TuneQDM", method="tuneqdm"),
    "tuneqdm-zo": _zo_scales("TuneQDM", method="tuneqdm", learning_rate=0.2),
    "tuneqdm-paper": _scales("TuneQDM, paper", method="tuneqdm", preset="paper"),
    "dreambooth": budgeted(
        "DreamBooth",
        "dreambooth",
        400,
        trainable="full",
        base_precision="as-loaded",
        learning_rate=2e-5,
        train_batch_size=_PICTURES,
    ),
    "qlora": budgeted(
        "QLoRA, r = 2", "dreambooth", 500, learning_rate=1e-3, train_batch_size=_PICTURES
    ),
    "selective": _selective("Selective, LoRA"),
    "selective-scales": _selective("Selective, scales", trainable="scales"),
    "selective-constant": _selective("Selective, constant probability", strategy="constant"),
    "selective-two-phase": _selective("Selective, two phases", strategy="two-phase"),
    "selective-bp-low": _selective("BP-low only", strategy="bp-low"),
    "selective-bp-high": _selective("BP-high only", strategy="bp-high"),
    "selective-zo-high": _selective("ZO-high only", strategy="zo-high"),
}


def facts(method: Method, scale: float, full: bool) -> dict[str, Any]:
    """What a row of the method depends on beside subject and seed: all options, defaults too."""
    options = method.resolved(scale, full)
    if "command" in options:
        options = options | make_config(options).recipe()
        options["max_train_steps"] = make_config(options).max_train_steps
        for name in ("pretrained_model_name_or_path", "train_data_dir", "seed"):
            options.pop(name)
    return {"title": method.title, "options": options}
