# SPDX-License-Identifier: Apache-2.0
"""A resumable training run under a time budget: what the stages of tiny-sd share."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn


def save_atomic(state: dict, path: Path) -> None:
    """torch.save by way of a temporary file beside ``path``: a kill leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def schedule(progress: float, warmup: float = 0.02) -> float:
    """Learning-rate factor at ``progress`` in [0, 1] of the time budget: linear warm-up, cosine."""
    if progress < warmup:
        return progress / warmup
    half = torch.tensor((progress - warmup) / (1 - warmup) * torch.pi)
    return max(0.02, 0.5 * (1 + torch.cos(half).item()))


class Ema:
    """Exponential moving average of a module's parameters, warmed up as (1 + n) / (10 + n)."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.module, self.decay, self.steps = module, decay, 0
        self.shadow = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.shadow, list(self.module.parameters()), 1 - decay)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        torch._foreach_copy_(list(self.module.parameters()), self.shadow)

    def state_dict(self) -> dict:
        return {"steps": self.steps, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        torch._foreach_copy_(self.shadow, state["shadow"])


class Run:
    """Iterate training steps until ``minutes`` are spent, over any number of starts.

    ``parts`` are the objects whose ``state_dict`` makes the run resumable; they are saved to
    ``path`` every ``save_every`` seconds and at the end, and restored from it when it exists.
    """

    def __init__(
        self,
        path: Path,
        minutes: float,
        parts: dict[str, object],
        optimizer: torch.optim.Optimizer,
        *,
        generator: torch.Generator,
        save_every: float = 180.0,
        log_every: int = 50,
    ) -> None:
        self.path, self.budget, self.parts = path, minutes * 60, parts
        self.optimizer, self.generator = optimizer, generator
        self.save_every, self.log_every = save_every, log_every
        self.spent, self.step = 0.0, 0
        self._sums: dict[str, float] = {}
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"])
            self.spent, self.step = state["spent"], state["step"]

    @property
    def progress(self) -> float:
        """Share of the time budget that is spent, which drives the schedules."""
        return self.spent / self.budget

    @property
    def done(self) -> bool:
        return self.spent >= self.budget

    def __iter__(self) -> Iterator[int]:
        saved = time.monotonic()
        while not self.done:
            factor = schedule(self.progress)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            start = time.monotonic()
            yield self.step
            self.step += 1
            now = time.monotonic()
            self.spent += now - start
            if now - saved > self.save_every:
                self.save()
                saved = now
        self.save()

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["optimizer"] = self.optimizer.state_dict()
        state["generator"] = self.generator.get_state()
        save_atomic(state | {"spent": self.spent, "step": self.step}, self.path)

    def log(self, **values: torch.Tensor) -> None:
        """Average ``values`` and write a line to the console every ``log_every`` steps."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
        if (self.step + 1) % self.log_every == 0:
            means = "  ".join(f"{k} {v / self.log_every:.4f}" for k, v in self._sums.items())
            print(
                f"{self.path.stem} step {self.step + 1}  {self.spent / 60:.1f} min  {means}",
                flush=True,
            )
            self._sums.clear()
