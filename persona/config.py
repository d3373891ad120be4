# SPDX-License-Identifier: Apache-2.0
"""Options of a run: frozen dataclasses whose fields are the command's flags."""

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona.errors import UserError


def option(default: Any, help: str, *aliases: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that is also a flag; ``aliases`` are other tools' names for it."""
    return field(default=default, metadata={"help": help, "aliases": aliases, "choices": choices})


@dataclass(frozen=True)
class TextualInversionConfig:
    """ZOODiP textual inversion (arXiv 2503.14868); names follow diffusers, defaults the paper.

    Raises:
        UserError: a value is out of range.
    """

    pretrained_model_name_or_path: str = option("", "model folder in diffusers' format, or hub id")
    train_data_dir: str = option("", "folder with the subject's pictures")
    output_dir: str = option("out", "where results go")
    placeholder_token: str = option("<sks>", "the new word", "token_string")
    initializer_token: str = option("", "one-token word for the class, e.g. dog", "init_word")
    num_vectors: int = option(1, "embedding rows of the new word", "num_vectors_per_token")
    learnable_property: str = option("object", "what to learn", choices=("object", "style"))
    resolution: int = option(0, "pixels a side; 0: the model's own")
    center_crop: bool = option(False, "crop to a square before resizing")
    random_flip: bool = option(False, "mirror a picture half of the time")
    train_batch_size: int = option(1, "pictures (each with a timestep and noise of its own) a step")
    max_train_steps: int = option(30_000, "steps; a step costs n + 1 forwards (two_sided: 2n)")
    learning_rate: float = option(5e-3, "of ZOAdam, in units of the embedding")
    zo_n: int = option(2, "random directions a step", "n")
    zo_eps: float = option(1e-3, "probe radius mu, in units of the embedding", "mu")
    zo_estimator: str = option(
        "one_sided", "how losses become a gradient", choices=("one_sided", "two_sided")
    )
    zo_tau: int = option(128, "steps between two subspaces", "tau")
    zo_nu: float = option(1e-3, "share of variance projected out", "nu")
    zo_subspace: str = option(
        "subspace", "Subspace Gradient, or a control", choices=("subspace", "random", "off")
    )
    zo_normalizer: str = option(
        "paper",
        "released-code divides the estimate by sqrt((d + n - 1) / n)",
        choices=("paper", "released-code"),
    )
    adam_beta1: float = option(0.9, "of ZOAdam")
    adam_beta2: float = option(0.999, "of ZOAdam")
    adam_epsilon: float = option(1e-3, "added outside the root, in loss / embedding")
    min_timestep: int = option(500, "T_L of the partial uniform window (PUTS)")
    max_timestep: int = option(900, "T_U, exclusive")
    base_precision: str = option("int8", "how weights are held", choices=("int8", "as-loaded"))
    activation_precision: str = option(
        "float",
        "what an int8 base multiplies; int8 is faster, but too coarse for zo_eps below 1e-2",
        choices=("float", "int8"),
    )
    evaluations_per_forward: int = option(0, "perturbed copies a forward; 0: all, or what fits")
    seed: int = option(0, "of everything random")
    checkpointing_steps: int = option(500, "steps between two resumable checkpoints")
    resume_from_checkpoint: bool = option(False, "go on from output_dir's checkpoint", "resume")
    validation_prompt: str = option("", "prompt of the pictures; {} is the token")
    num_validation_images: int = option(4, "pictures before and after; 0: none")
    num_inference_steps: int = option(25, "sampler steps of these pictures")
    guidance_scale: float = option(5.0, "classifier-free guidance of these pictures")

    def __post_init__(self) -> None:
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if not value >= low:
                raise UserError(f"{name}: must be at least {low}, got {value}; see --help")
        for name in ("learning_rate", "zo_eps", "adam_epsilon"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"{name}: must be positive and finite, got {value}; see --help")
        for name, value in (("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)):
            if not 0 <= value < 1:
                raise UserError(f"{name}: must be in [0, 1), got {value}; 0.9 and 0.999 are usual")
        if not self.zo_nu < 1:
            raise UserError(f"zo_nu: must be below 1, got {self.zo_nu}; the paper's is 1e-3")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed: must fit into 64 bits, got {self.seed}; take a smaller one")
        if not 0 <= self.min_timestep < self.max_timestep:
            raise UserError(
                f"max_timestep: must be above min_timestep ({self.min_timestep}), got "
                f"{self.max_timestep}; the paper's window is 500 to 900"
            )
        shown = self.validation_prompt
        if shown and "{}" not in shown and self.placeholder_token not in shown:
            raise UserError(
                f"validation_prompt: must hold {{}} where the token goes, got {shown!r}; write for "
                "example 'a photo of {} on a sofa'"
            )
        for item in dataclasses.fields(self):
            choices = item.metadata["choices"]
            if choices and getattr(self, item.name) not in choices:
                raise UserError(
                    f"{item.name}: must be one of {', '.join(choices)}, got "
                    f"{getattr(self, item.name)!r}; see --help"
                )

    @property
    def output(self) -> Path:
        return Path(self.output_dir)

    def recipe(self) -> dict[str, Any]:
        """What a resumed run must share with the run that it goes on from."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _MAY_CHANGE}


_AT_LEAST = {
    "num_vectors": 1,
    "resolution": 0,
    "train_batch_size": 1,
    "max_train_steps": 1,
    "zo_n": 1,
    "zo_tau": 2,
    "zo_nu": 0,
    "evaluations_per_forward": 0,
    "checkpointing_steps": 1,
    "num_validation_images": 0,
    "num_inference_steps": 1,
    "guidance_scale": 0,
}
_MAY_CHANGE = {
    "output_dir",
    "max_train_steps",
    "checkpointing_steps",
    "resume_from_checkpoint",
    "validation_prompt",
    "num_validation_images",
    "num_inference_steps",
    "guidance_scale",
    "evaluations_per_forward",
}


def flags(item: dataclasses.Field) -> list[str]:
    """``["--max_train_steps"]``: the flag of a field, then other tools' names for it."""
    return [f"--{name}" for name in (item.name, *item.metadata["aliases"])]


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """One flag a field of the dataclass ``config``; other tools' names for it are accepted too."""
    for item in dataclasses.fields(config):
        names = flags(item)
        text = f"{item.metadata['help']} (default: {item.default!r})"
        if item.type is bool:
            parser.add_argument(*names, action="store_true", help=text)
        else:
            parser.add_argument(
                *names,
                dest=item.name,
                type=item.type,
                default=item.default,
                choices=item.metadata["choices"],
                help=text.replace("%", "%%"),
            )


def from_flags(args: argparse.Namespace, config: type) -> Any:
    """The dataclass ``config`` from parsed flags."""
    return config(**{item.name: getattr(args, item.name) for item in dataclasses.fields(config)})
