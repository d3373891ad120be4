# SPDX-License-Identifier: Apache-2.0
"""Options of a run: what all methods share, and those of textual inversion."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from persona.errors import UserError
from persona.options import check, option, parse_size


@dataclass(frozen=True)
class RunConfig:
    """What every method takes; names follow diffusers' scripts. A method's own options are those of
    a subclass, which may give these other defaults.

    Attributes:
        command: its subcommand of ``persona``.
        presets: names of whole recipes, and what each has other than the defaults.
        default_preset: that of the command where neither preset nor optimizer is given; "": none.

    Raises:
        UserError: a value is out of range.
    """

    command: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    default_preset: ClassVar[str] = ""

    pretrained_model_name_or_path: str = option("", "model folder in diffusers' format, or hub id")
    train_data_dir: str = option("", "folder with the subject's pictures")
    output_dir: str = option("out", "where results go", may_change=True)
    placeholder_token: str = option("sks", "rare word that stands for the subject", "token_string")
    initializer_token: str = option("", "word for the subject's class, e.g. dog", "init_word")
    learnable_property: str = option("object", "what to learn", choices=("object", "style"))
    resolution: int = option(0, "pixels a side; 0: the model's own", at_least=0)
    center_crop: bool = option(False, "crop to a square before resizing")
    random_flip: bool = option(False, "mirror a picture half of the time")
    train_batch_size: int = option(
        1, "pictures (each with a timestep and noise of its own) a step", at_least=1
    )
    max_train_steps: int = option(400, "steps", at_least=1, may_change=True)
    learning_rate: float = option(5e-6, "step size", positive=True)
    base_precision: str = option(
        "int8",
        "how weights are held; int4: the UNet's, the others int8",
        choices=("int8", "int4", "as-loaded"),
    )
    activation_precision: str = option(
        "float",
        "what an integer base multiplies; int8 is faster, and coarser",
        choices=("float", "int8"),
    )
    device: str = option(
        "auto",
        "what the model computes on: cpu, cuda, cuda:N; auto: cuda where there is one, else cpu",
        may_change=True,
    )
    memory_budget: str = option(
        "",
        "most that the process (on CUDA: torch) may hold, such as 1.5GB or 900MiB; a run that "
        "takes more is refused before it begins, with what would fit",
        may_change=True,
    )
    min_timestep: int = option(0, "lowest timestep of training")
    max_timestep: int = option(1000, "highest timestep of training, exclusive")
    seed: int = option(0, "of everything random")
    checkpointing_steps: int = option(
        500, "steps between two resumable checkpoints", at_least=1, may_change=True
    )
    resume_from_checkpoint: bool = option(
        False, "go on from output_dir's checkpoint", "resume", may_change=True
    )
    validation_prompt: str = option("", "prompt of the pictures; {} is the token", may_change=True)
    num_validation_images: int = option(
        4, "pictures before and after; 0: none", at_least=0, may_change=True
    )
    num_inference_steps: int = option(
        25, "sampler steps of these pictures", at_least=1, may_change=True
    )
    guidance_scale: float = option(
        5.0, "classifier-free guidance of these pictures", at_least=0, may_change=True
    )

    def __post_init__(self) -> None:
        check(self)
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed: must fit into 64 bits, got {self.seed}; take a smaller one")
        if not 0 <= self.min_timestep < self.max_timestep:
            raise UserError(
                f"max_timestep: must be above min_timestep ({self.min_timestep}), which is at "
                f"least 0, got {self.max_timestep}; ZOODiP's window is 500 to 900"
            )
        parse_size("memory_budget", self.memory_budget or "0 B")
        shown = self.validation_prompt
        if shown and "{}" not in shown and self.placeholder_token not in shown:
            raise UserError(
                f"validation_prompt: must hold {{}} where the token goes, got {shown!r}; write for "
                "example 'a photo of {} on a sofa'"
            )

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> Self:
        """The recipe called ``name``, with ``options`` in place of its own.

        Raises:
            UserError: there is none of this name, or a value is out of range.
        """
        if name not in cls.presets:
            raise UserError(
                f"preset: must be one of {', '.join(cls.presets)}, got {name!r}; see persona "
                f"{cls.command} --help"
            )
        return cls(**cls.presets[name] | options)

    def require(self, *names: str) -> None:
        """Raise unless these options are given.

        Raises:
            UserError: one is not.
        """
        for name in names:
            if not getattr(self, name):
                raise UserError(
                    f"{name}: must be given, got nothing; see persona {self.command} --help"
                )

    @property
    def output(self) -> Path:
        return Path(self.output_dir)

    @property
    def budget(self) -> int | None:
        """``memory_budget`` in bytes; None: there is none."""
        return parse_size("memory_budget", self.memory_budget) if self.memory_budget else None

    @property
    def subject(self) -> str:
        """What stands for ``{}`` in a prompt: the rare word and the class, as in "sks dog"."""
        return f"{self.placeholder_token} {self.initializer_token}".strip()

    @property
    def rate(self) -> float | None:
        """The learning rate; None where the optimizer has none."""
        return self.learning_rate

    def recipe(self) -> dict[str, Any]:
        """What a resumed run must share with the run that it goes on from."""
        items = dataclasses.fields(self)
        return {i.name: getattr(self, i.name) for i in items if not i.metadata["may_change"]}


@dataclass(frozen=True)
class TextualInversionConfig(RunConfig):
    """Textual inversion, by forward passes (ZOODiP, arXiv 2503.14868, or Gauss-Newton) or by
    backpropagation.

    Presets: "gauss-newton" (ours, `persona.gauss_newton`) is the command's default: of what
    `benchmarks.fewer_forwards` compares it needs the fewest forwards. "paper" and "released-code"
    are ZOODiP's, which differ; the paper names no epsilon for Adam, so "paper" has Adam's own.
    "backprop" is Gal et al. 2022 (arXiv 2208.01618) as ZOODiP's paper runs it for comparison, with
    AdamW's weight decay as in diffusers' script.

    Raises:
        UserError: a value is out of range, or two options exclude each other.
    """

    command: ClassVar[str] = "ti"
    default_preset: ClassVar[str] = "gauss-newton"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"adam_epsilon": 1e-8},
        "released-code": {"learning_rate": 1e-2, "zo_normalizer": "released-code"},
        "gauss-newton": {
            "optimizer": "gauss-newton",
            "max_train_steps": 100,
            "zo_n": 8,
            "zo_eps": 1e-2,
            "zo_space": "subspace",
            "zo_rank": 32,
        },
        "backprop": {
            "optimizer": "bp",
            "max_train_steps": 5000,
            "adam_epsilon": 1e-8,
            "adam_weight_decay": 1e-2,
            "min_timestep": 0,
            "max_timestep": 1000,
        },
    }

    placeholder_token: str = option("<sks>", "the new word", "token_string")
    initializer_token: str = option("", "one-token word for the class, e.g. dog", "init_word")
    num_vectors: int = option(
        1, "embedding rows of the new word", "num_vectors_per_token", at_least=1
    )
    max_train_steps: int = option(
        30_000, "steps; a step costs n + 1 forwards (two_sided: 2n)", at_least=1, may_change=True
    )
    optimizer: str = option(
        "zo",
        "by forward passes, ZOODiP's or gauss-newton; or backpropagation into the new rows",
        choices=("zo", "gauss-newton", "bp"),
    )
    learning_rate: float = option(5e-3, "of Adam, in units of the embedding", positive=True)
    learning_rate_schedule: str = option(
        "constant", "cosine: falls to 0 at max_train_steps", choices=("constant", "cosine")
    )
    average: float = option(
        0.0,
        "decay a step of a running mean of the token, which is the result; 0: the last token",
        at_least=0,
        below=1,
    )
    fixed_draws: int = option(
        0, "train on so many draws of picture, noise and timestep; 0: fresh ones", at_least=0
    )
    early_stopping_patience: int = option(
        0,
        "checks of a fixed loss without a better token that end training; 0: none",
        at_least=0,
    )
    early_stopping_steps: int = option(100, "steps between two such checks", at_least=1)
    zo_n: int = option(2, "random directions a step", "n", at_least=1)
    zo_eps: float = option(1e-3, "probe radius mu, in units of the embedding", "mu", positive=True)
    zo_estimator: str = option(
        "one_sided", "how losses become a gradient", choices=("one_sided", "two_sided", "one_point")
    )
    zo_space: str = option(
        "full",
        "where directions lie: subspace, where words differ; vocabulary, as far as they do; "
        "encoder, what the text encoder lets through; random, a control",
        choices=("full", "vocabulary", "subspace", "random", "encoder"),
    )
    zo_rank: int = option(0, "dimensions of zo_space; 0: all", at_least=0)
    zo_damping: float = option(
        8.0, "of gauss-newton, share of the loss / embedding^2; higher: shorter", positive=True
    )
    zo_tau: int = option(128, "steps between two subspaces", "tau", at_least=2)
    zo_nu: float = option(1e-3, "share of variance projected out", "nu", at_least=0, below=1)
    zo_subspace: str = option(
        "subspace",
        "Subspace Gradient, or a control: of a buffer that is not standardized, random, none",
        choices=("subspace", "centred", "random", "off"),
    )
    zo_normalizer: str = option(
        "paper",
        "released-code divides the estimate by sqrt((d + n - 1) / n)",
        choices=("paper", "released-code"),
    )
    adam_beta1: float = option(0.9, "of Adam", at_least=0, below=1)
    adam_beta2: float = option(0.999, "of Adam", at_least=0, below=1)
    adam_epsilon: float = option(1e-3, "added outside the root, in loss / embedding", positive=True)
    adam_weight_decay: float = option(0.0, "of AdamW; a share of the learning rate", at_least=0)
    min_timestep: int = option(500, "T_L of the partial uniform window (PUTS)")
    max_timestep: int = option(900, "T_U, exclusive")
    activation_precision: str = option(
        "float",
        "what an integer base multiplies; int8 is faster, but too coarse for zo_eps below 1e-2",
        choices=("float", "int8"),
    )
    evaluations_per_forward: int = option(
        0,
        "perturbed copies a forward; 0: as many as hold what drawing a picture does",
        at_least=0,
        may_change=True,
    )
    cuda_graph: bool = option(
        False, "replay the UNet's forwards as CUDA graphs (zo, on a GPU)", may_change=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cuda_graph(self.cuda_graph, self.optimizer)
        if self.optimizer == "gauss-newton" and self.zo_estimator != "one_sided":
            raise UserError(
                f"zo_estimator: must be one_sided where optimizer is gauss-newton, got "
                f"{self.zo_estimator!r}; leave it out, or take optimizer zo"
            )

    @property
    def subject(self) -> str:
        """The new word alone: it takes the place of the class."""
        return self.placeholder_token

    @property
    def rate(self) -> float | None:
        return None if self.optimizer == "gauss-newton" else self.learning_rate

    def recipe(self) -> dict[str, Any]:
        shared = super().recipe()
        if self.learning_rate_schedule != "constant":  # it ends where the run was to end
            shared["max_train_steps"] = self.max_train_steps
        return shared


def check_cuda_graph(cuda_graph: bool, optimizer: str) -> None:
    """Raises UserError where a graph is asked for of what has gradients."""
    if cuda_graph and optimizer == "bp":
        raise UserError(
            "cuda_graph: must be left out where optimizer is bp, got both; a graph is of forward "
            "passes, use optimizer zo"
        )
