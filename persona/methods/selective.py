# SPDX-License-Identifier: Apache-2.0
"""Selective optimization: each step backpropagates at low resolution or probes at high.

Choi, Park, Park, Kim and Yun 2025, arXiv 2507.10029. BP-low: AdamW on gradients of small pictures,
whose activations are few. ZO-high: MeZO (arXiv 2305.17333) on large ones, forward passes only. A
coin with p(t, k) decides; see `persona.selection`. Both move the same parameters, each with its own
state and learning rate, so that the noise of probes never enters AdamW's moments. Memory is that of
the larger of the two.

The paper's probability, resolutions and hyperparameters were not to be had: ours stand for them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from persona.backprop import Backprop
from persona.base import check_resolution
from persona.batches import Batch, Batches, losses
from persona.config_selective import SelectiveConfig
from persona.data import Example
from persona.errors import UserError
from persona.families import StableDiffusion
from persona.memory import peak_of
from persona.methods import _method
from persona.methods._method import Method, Step
from persona.optimizer_state import flatten, part_of, prefixed, restore
from persona.selection import Selection
from zo_kernels.optim import ZOSGD

KINDS = ("bp-low", "bp-high", "zo-high")


class Trainable(Protocol):
    """What learns: LoRA matrices or scales."""

    parameters: dict[str, nn.Parameter]

    def save(self, folder: Path, metadata: dict[str, str]) -> Path: ...


class Selective(Method):
    """What learns, AdamW's moments and the count of probes, and what is drawn from.

    Args:
        family: the model; its UNet is trained in place.
        config: options.
        examples: the subject's pictures, at the high resolution.

    Attributes:
        counts: kind of step -> how many there were.
        peaks: kind of step -> highest memory of one in this process, bytes.

    Raises:
        UserError: peft is missing, no layer is called as lora_targets says, or the model does not
            allow the low resolution.
    """

    def __init__(
        self, family: StableDiffusion, config: SelectiveConfig, examples: list[Example]
    ) -> None:
        self.family, self.config = family, config
        self.steps = self.rejected = 0
        self.counts, self.peaks = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.selection = Selection(
            timestep=config.timestep_curve,
            progress=config.progress_curve,
            centre=config.timestep_center,
            width=config.timestep_width,
            end=config.progress_end,
            low=config.min_probability,
            high=config.max_probability,
        )
        high = examples[0].image.width
        low = config.low_resolution or high // 2
        check_resolution("low_resolution", low, family)
        if low >= high:
            raise UserError(
                f"low_resolution: must be below the high one ({high}), got {low}; 0 takes half"
            )
        self.resolutions = {"bp-low": low, "bp-high": high, "zo-high": high}
        self.batches = Batches(family, examples, config, config.subject, sorted({low, high}))
        self.trainable = _trainable(family, config)
        self.parameters = self.trainable.parameters
        if config.gradient_checkpointing:
            family.unet.enable_gradient_checkpointing()
        self.backprop = Backprop(self.parameters.values(), config)
        self.zo = ZOSGD(
            self.parameters.items(),
            lr=config.zo_learning_rate,
            eps=config.zo_eps,
            n=config.zo_n,
            seed=config.seed,
        )

    @property
    def forwards(self) -> int:
        zo = self.counts["zo-high"]
        return self.steps - zo + 2 * self.config.zo_n * zo

    def run(self) -> Iterator[Step]:
        """Train up to ``config.max_train_steps``; yields after every step, with the state whole."""
        while self.steps < self.config.max_train_steps:
            yield self.step()

    def step(self) -> Step:
        """One update of the kind that the coin chose; it falls alike for every strategy."""
        t = self.batches.window.sample(self.config.train_batch_size, self.generator)
        coin = torch.rand((), generator=self.generator).item()
        kind = self.kind(t, coin)
        batch = self.batches.draw(self.generator, t, resolution=self.resolutions[kind])
        update = self._probe if kind == "zo-high" else self._backpropagate
        with peak_of(self.family.device) as peak:
            loss, accepted = update(batch)
        self.peaks[kind] = max(self.peaks[kind], peak.bytes)
        self.steps += 1
        self.counts[kind] += 1
        self.rejected += not accepted
        more = {"kind": kind, "counts": dict(self.counts), "peaks": dict(self.peaks)}
        return Step(self.steps, loss, self.forwards, self.rejected, more)

    def kind(self, t: Tensor, coin: float) -> str:
        """The kind of the next step, for its timesteps [B] and a coin in [0, 1)."""
        config = self.config
        if config.strategy in KINDS:
            return config.strategy
        progress = self.steps / config.max_train_steps
        if config.strategy == "two-phase":
            chosen = progress < config.bp_share
        elif config.strategy == "constant":
            chosen = coin < config.bp_share
        else:  # of a batch with several timesteps, the mean (ours)
            shares = (t / len(self.family.abar)).tolist()
            p = sum(self.selection.probability(share, progress) for share in shares) / len(shares)
            chosen = coin < p
        return "bp-low" if chosen else "zo-high"

    def _backpropagate(self, batch: Batch) -> tuple[float, bool]:
        return self.backprop.step(lambda: losses(self.family, batch).mean())

    def _probe(self, batch: Batch) -> tuple[float, bool]:
        before = self.zo.rejected
        loss = self.zo.step(lambda: losses(self.family, batch).mean())
        return loss, self.zo.rejected == before

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "counts": torch.tensor([self.steps, self.rejected, *self.counts.values()]),
            "generator": self.generator.get_state(),
            **prefixed("parameters", {k: p.detach() for k, p in self.parameters.items()}),
            **prefixed("bp", self.backprop.state_dict()),
            **prefixed("zo", flatten(self.zo)),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps, self.rejected, *counts = state["counts"].tolist()
        self.counts = dict(zip(KINDS, counts, strict=True))
        self.generator.set_state(state["generator"])
        for name, tensor in part_of("parameters", state).items():
            self.parameters[name].copy_(tensor)
        self.backprop.load_state_dict(part_of("bp", state))
        restore(self.zo, part_of("zo", state))

    def save(self, folder: Path) -> Path:
        """LoRA: a file for ``pipe.load_lora_weights``; scales: one for `persona.scales`."""
        return self.trainable.save(folder, self.metadata())

    def metadata(self) -> dict[str, str]:
        name = f"selective-{self.config.strategy}"
        counts = {f"persona.steps.{kind}": str(count) for kind, count in self.counts.items()}
        return _method.metadata(self, self.config, name, len(self.batches)) | counts


def _trainable(family: StableDiffusion, config: SelectiveConfig) -> Trainable:
    if config.trainable == "lora":
        from persona.lora import Lora  # peft is needed for nothing else

        return Lora(family.unet, config.rank, config.lora_targets, config.seed)
    from persona.scale_parameters import ScaleParameters

    return ScaleParameters(family)
