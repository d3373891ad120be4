# SPDX-License-Identifier: Apache-2.0
"""Scale tuning: the integers of a quantized UNet stay, their scales learn a subject.

| method | sets of scales | source |
|---|---|---|
| `peqa` | one, of the outputs | PEQA, arXiv 2305.14152: W = (s0 + ds) Wbar |
| `s1` | one, trained at t in chosen intervals and used there | arXiv 2401.04339 v1, abstract |
| `s2` | one for each of N equal intervals | the same |
| `tuneqdm` | the same, of outputs and inputs: W = (s_out + d_out) (Wq - z) (s_in + d_in) | v2 |

Of S1 and S2 only the abstract was to be had: which intervals, and that the base model's scales
serve outside of S1's, is our reading; so is S1's default interval. Timesteps of a batch may lie in
several intervals: each set then sees its members.

By backpropagation: AdamW, through the integers (`zo_kernels.ops.qlinear`). By zeroth order: the 2n
sides of n two-sided probes (SPSA) share one pass over the integer weights, by
`zo_kernels.nn.perturbed`; the update makes the same noise again, and nothing is kept but the
scales. No publication trains scales so; the relative probe moves s to s (1 + eps z), and the step
likewise s to s (1 + u).
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from persona.backprop import Backprop
from persona.batches import Batch, Batches, copies_at_a_time, losses
from persona.config_scales import ScaleTuningConfig
from persona.data import Example
from persona.families import StableDiffusion
from persona.graphed import graphed
from persona.methods import _method
from persona.methods._method import Method, Step
from persona.optimizer_state import part_of, prefixed
from persona.scales import FILE, Switch, digest, save_scales
from zo_kernels.estimators import schedule, two_sided
from zo_kernels.nn import QuantModule, input_stream, perturbed, streams_of
from zo_kernels.ops import add_noise_


class ScaleSets:
    """S sets of scales of a UNet, each a vector of P numbers beside the scales that were there.

    Args:
        unet: contains quantized modules; not changed.
        kinds: "scale", or that and "in_scale", which starts from 1.
        count: S.
        relative: a set holds r of s = s0 (1 + r), else d of s = s0 + d.

    Attributes:
        theta: S tensors fp32 [P], r or d.
        base: "<layer>.<kind>" -> s0; None where there is no in_scale.
    """

    def __init__(self, unet: nn.Module, kinds: tuple[str, ...], count: int, relative: bool) -> None:
        self.relative = relative
        self.base: dict[str, Tensor | None] = {}
        self.streams: list[int] = []
        self._shapes: list[torch.Size] = []
        streams = streams_of(unet)
        for layer, module in unet.named_modules():
            if not isinstance(module, QuantModule):
                continue
            for kind in kinds:
                scale = getattr(module, kind)
                self.base[f"{layer}.{kind}"] = None if scale is None else scale.detach()
                self._shapes.append(torch.Size([module.inputs]) if scale is None else scale.shape)
                stream = streams[layer]
                self.streams.append(stream if kind == "scale" else input_stream(stream))
        device = next(unet.parameters()).device
        size = sum(shape.numel() for shape in self._shapes)
        self.theta = [torch.zeros(size, device=device) for _ in range(count)]

    def views(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector [P] in the shapes of the scales."""
        parts = vector.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def scales(self, number: int) -> dict[str, Tensor]:
        """Set `number`, with the graph to its vector where gradients are enabled."""
        made = {}
        for (name, base), own in zip(
            self.base.items(), self.views(self.theta[number]), strict=True
        ):
            if base is None:  # a factor of 1
                made[name] = 1 + own
            else:
                made[name] = base * (1 + own) if self.relative else base + own
        return made

    @torch.no_grad()
    def spread_inputs(self, std: float, generator: torch.Generator) -> None:
        """Let every input scale start from N(1, std), the same in each set."""
        start = self.views(torch.zeros(len(self.theta[0])))
        for name, view in zip(self.base, start, strict=True):
            if name.endswith(".in_scale"):
                view.normal_(0, std, generator=generator)
        for theta in self.theta:
            for own, view in zip(self.views(theta), start, strict=True):
                own.copy_(view)

    @torch.no_grad()
    def move_(self, number: int, seed: int, draws: list[int], steps: list[float]) -> None:
        """Add steps[j] times the noise of draws[j], as `perturbed` has it for signs."""
        theta = self.theta[number]
        change = torch.zeros_like(theta)
        add_noise_(self.views(change), self.streams, seed, draws, steps, kind="rademacher")
        theta += change * (1 + theta) if self.relative else change


class ScaleTuning(Method):
    """The sets of scales and everything that their training keeps.

    Args:
        family: the frozen model, its UNet quantized; its scales are switched by timestep from now
            on, also when pictures are made.
        config: options.
        examples: the subject's pictures.

    Raises:
        UserError: the intervals cover no timestep of the model that is trained.
    """

    def __init__(
        self, family: StableDiffusion, config: ScaleTuningConfig, examples: list[Example]
    ) -> None:
        self.family, self.config = family, config
        self.served = config.served(len(family.abar))
        self.batches = Batches(family, examples, config, config.subject)
        self.unet = family.unet
        kinds = ("scale", "in_scale") if config.method == "tuneqdm" else ("scale",)
        self.sets = ScaleSets(
            self.unet, kinds, self.served.count, config.parametrization == "relative"
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        if "in_scale" in kinds and config.in_scale_std:
            self.sets.spread_inputs(config.in_scale_std, self.generator)
        graph = config.cuda_graph
        self.switch = Switch(self.unet, self.served, self.sets.scales, self.sets.base, fixed=graph)
        self.predict = graphed(family) if graph else None
        self.steps = 0
        self.rejected = 0  # steps whose loss was not finite
        self._sample_timesteps()  # that there are some
        if config.optimizer == "bp":
            self.backprop = Backprop([theta.requires_grad_() for theta in self.sets.theta], config)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    @property
    def forwards(self) -> int:
        return self.steps * (2 * self.config.zo_n if self.config.optimizer == "zo" else 1)

    def run(self) -> Iterator[Step]:
        """Train up to ``config.max_train_steps``; yields after every step, with the state whole."""
        while self.steps < self.config.max_train_steps:
            yield self.step()

    def step(self) -> Step:
        """One update of the sets that the batch has members for; one whose loss is not finite is
        counted and changes nothing."""
        batch = self.batches.draw(self.generator, self._sample_timesteps())
        parts = [
            (number, Batch(*(value[members.to(value.device)] for value in batch)))
            for number, members in self.served.groups(batch.t).items()
            if number is not None
        ]
        train = self._backpropagate if self.config.optimizer == "bp" else self._probe
        loss = train(parts, len(batch.t))
        self.steps += 1
        return Step(self.steps, loss, self.forwards, self.rejected)

    def _sample_timesteps(self) -> Tensor | None:
        """Of the intervals that s1 trains; None: those of the window, drawn with the batch."""
        config = self.config
        if config.method != "s1":
            return None
        chosen = type(self.served).selected(config.intervals)
        low, high = config.min_timestep, config.max_timestep
        return chosen.sample(config.train_batch_size, low, high, self.generator)

    def _backpropagate(self, parts: list[tuple[int, Batch]], size: int) -> float:
        terms = [lambda part=part: losses(self.family, part).sum() / size for _, part in parts]
        total, accepted = self.backprop.step(*terms)
        self.rejected += not accepted
        return total

    @torch.no_grad()
    def _probe(self, parts: list[tuple[int, Batch]], size: int) -> float:
        config = self.config
        first = [
            (self.steps * config.train_batch_size + place) * config.zo_n
            for place in range(len(parts))
        ]
        found = torch.stack(
            [
                self._evaluate(number, part, draw) * (len(part.t) / size)
                for (number, part), draw in zip(parts, first, strict=True)
            ]
        ).cpu()  # [parts, 2n]: the one moment when the host waits
        total = sum(sides.mean().item() for sides in found)
        if not found.isfinite().all():
            self.rejected += 1
            return total
        for (number, _), draw, sides in zip(parts, first, found, strict=True):
            steps = [-config.learning_rate * c for c in two_sided(sides.double(), config.zo_eps)]
            draws = [draw + j for j in range(config.zo_n)]
            self.sets.move_(number, config.seed, draws, steps)
        return total

    def _evaluate(self, number: int, part: Batch, first: int) -> Tensor:
        """Losses [2n] of a set's two sides along each direction, over its members; on the model's
        device."""
        config = self.config
        sides = [
            (first + j, sign * config.zo_eps) for j, sign in schedule("two_sided", config.zo_n)
        ]
        at_once = config.evaluations_per_forward or copies_at_a_time(self.family, part)
        found = []
        with self.switch.held(number):  # what is perturbed
            for start in range(0, len(sides), at_once):
                some = sides[start : start + at_once]
                with perturbed(
                    self.unet,
                    seed=config.seed,
                    draws=[draw for draw, _ in some],
                    coeffs=[coeff for _, coeff in some],
                    what="scale_relative" if self.sets.relative else "scale",
                    inputs=config.method == "tuneqdm",
                ):
                    errors = losses(self.family, part, copies=len(some), predict=self.predict)
                found.append(errors.view(len(some), -1).mean(1))
        return torch.cat(found)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a bit-identical resume needs: the sets, and AdamW's moments of each."""
        state = {
            "theta": torch.stack([theta.detach() for theta in self.sets.theta]),
            "counts": torch.tensor([self.steps, self.rejected]),
            "generator": self.generator.get_state(),
        }
        if self.config.optimizer == "bp":
            state |= prefixed("optimizer", self.backprop.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for theta, saved in zip(self.sets.theta, state["theta"], strict=True):
                theta.copy_(saved)
        self.steps, self.rejected = state["counts"].tolist()
        self.generator.set_state(state["generator"])
        if self.config.optimizer == "bp":
            self.backprop.load_state_dict(part_of("optimizer", state))

    @torch.no_grad()
    def save(self, folder: Path) -> Path:
        """``scales.safetensors``, which `persona.scales.load_scales` gives to a quantized UNet."""
        self.switch.place(None)
        sets = [self.sets.scales(i) for i in range(self.served.count)]
        path = folder / FILE
        save_scales(path, sets, self.served, digest(self.unet), self.metadata())
        return path

    def metadata(self) -> dict[str, str]:
        config = self.config
        more = {
            "persona.optimizer": config.optimizer,
            "persona.parametrization": config.parametrization,
        }
        return _method.metadata(self, config, config.method, len(self.batches)) | more
