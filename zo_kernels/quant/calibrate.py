# SPDX-License-Identifier: Apache-2.0
"""Quantization with calibration data: which way each weight is rounded is learned, block by block.

AdaRound (arXiv 2004.10568) with BRECQ's reconstruction of blocks (arXiv 2102.05426), as Q-Diffusion
(arXiv 2302.04304) applies them to a UNet. Of a weight w with scale s and zero point o,

    W = s (clamp(floor(w / s) + h(a) + o) - o),  h(a) = clamp(1.2 sigmoid(a) - 0.1, 0, 1)

and a is learned such that the block, fed by the blocks quantized before it, gives the output of the
float model:

    |block(x_quantized) - block_float(x_float)|^2, summed over channels, mean over the rest
    + weight * sum (1 - |2 h(a) - 1|^b),  b from 20 down to 2 after a share of steps without

Then h is 0 or 1. A block that nearest rounding serves better on the data keeps that (ours).
Q-Diffusion's split of the concatenations in the up blocks, a scale for each half, is what specs
with groups ("-g64") have everywhere.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from zo_kernels.nn import Spec
from zo_kernels.nn._check import check_weight
from zo_kernels.nn._korder import from_rows, to_rows
from zo_kernels.quant._plan import QUANT_TYPES, aliases, plan, replace_module
from zo_kernels.quant.config import QuantConfig
from zo_kernels.quant.convert import CONFIG_ATTRIBUTE
from zo_kernels.quant.rounding import ROUNDINGS, grid_of

Call = tuple[Sequence[Any], Mapping[str, Any]]  # args and kwargs of a forward pass
_LOW, _HIGH = -0.1, 1.1  # gamma and zeta of AdaRound


@dataclass(frozen=True)
class Reconstruction:
    """How long and how strictly blocks are fitted. The defaults are ours, for minutes on small
    models; Q-Diffusion takes 20,000 steps at 1e-3.

    Attributes:
        steps: of Adam, for each block; each sees one call.
        lr: of Adam, in units of a.
        weight: of the term that drives h to 0 or 1.
        warmup: share of the steps without that term.
        seed: of the order of the calls.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int = 300
    lr: float = 1e-2
    weight: float = 0.01
    warmup: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, requirement in (
            ("steps", self.steps >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("weight", self.weight >= 0, "at least 0"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
        ):
            if not ok:
                raise ValueError(
                    f"Reconstruction: {name} must be {requirement}, got {getattr(self, name)}; "
                    "leave it out for the default"
                )


def reconstruct_(
    model: nn.Module,
    calls: Sequence[Call],
    config: QuantConfig,
    blocks: Sequence[str] = (),
    how: Reconstruction | None = None,
) -> dict[str, tuple[float, float]]:
    """Quantize `model` in place as `quantize_` does, with rounding learned from data.

    Beside the model, a float copy of it and the inputs and outputs of one block are in memory.

    Example:
        >>> config = QuantConfig("w4-asym", rounding="l2.4")
        >>> blocks = ("*resnets.?", "*transformer_blocks.?")
        >>> errors = reconstruct_(unet, [((x, t, text), {}) for x, t, text in data], config, blocks)

    Args:
        model: a float model, in eval mode.
        calls: args and kwargs of forward passes, some samples each.
        config: spec, layers and the rule that chooses the scales.
        blocks: patterns (`fnmatch`) of modules that are fitted as one; the outermost counts. The
            layers outside of them are fitted one by one.
        how: default `Reconstruction()`.

    Returns:
        For each block, in the order of execution: its mean squared error on the calls with nearest
        rounding, and with the rounding that it got.

    Raises:
        ValueError: no calls; a pattern matches no module; or see `quantize_`. The model is as it
            was.
    """
    how = how or Reconstruction()
    if not calls:
        raise ValueError(
            "reconstruct_: calls must be at least one forward pass, got none; record some inputs"
        )
    work = plan(model, config, "reconstruct_")
    for name in work.quantized:
        check_weight(model.get_submodule(name).get_parameter("weight"), "reconstruct_", name)
    units = _units(model, list(work.quantized), blocks)
    original = copy.deepcopy(model)
    errors = {}
    for unit in _executed(original, units, calls[0]):
        layers = {name: work.quantized[name] for name in units[unit]}
        seen = [_capture(model, unit, call)[0] for call in calls]
        wanted = [_capture(original, unit, call)[1] for call in calls]
        fitted = _Unit(model.get_submodule(unit), unit, layers, config)
        errors[unit] = fitted.fit(seen, wanted, how)
        fitted.replace(model)
    for name, names in aliases(model).items():  # layers that no call reached
        if name in work.quantized and type(model.get_submodule(name)) in QUANT_TYPES:
            layer: Any = model.get_submodule(name)
            rule = ROUNDINGS[config.rounding]
            rounded = QUANT_TYPES[type(layer)].from_float(
                layer, rule, work.quantized[name], config.headroom
            )
            for alias in names:
                replace_module(model, alias, rounded)
    setattr(model, CONFIG_ATTRIBUTE, config)
    return errors


class _Layer:
    """A weight between two roundings: floor(w / s) + h(a)."""

    def __init__(self, weight: Tensor, spec: Spec, config: QuantConfig) -> None:
        self.spec, self.shape, grid = spec, weight.shape, grid_of(spec, config.headroom)
        self.low, self.high = grid.low, grid.high
        rounded = ROUNDINGS[config.rounding](weight, spec, config.headroom)
        self.nearest, self.scale, self.zero_point = rounded
        groups = self.scale[0].numel()
        self.s = self.scale.reshape(len(self.scale), groups, 1)
        self.zero = 0.0 if self.zero_point is None else self.zero_point.float().view_as(self.s)
        steps = to_rows(weight.detach().float()).reshape(len(weight), groups, -1) / self.s
        self.floor = steps.floor()
        share = ((steps - self.floor - _LOW) / (_HIGH - _LOW)).clamp_(1e-4, 1 - 1e-4)
        self.a = share.logit().requires_grad_()  # h(a) is the fraction

    def h(self) -> Tensor:
        return (self.a.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def weight(self, h: Tensor) -> Tensor:
        steps = (self.floor + h + self.zero).clamp(self.low, self.high) - self.zero
        return from_rows((steps * self.s).flatten(1), self.shape)

    def codes(self) -> Tensor:
        """int8: of the way that was learned."""
        steps = self.floor + (self.a.detach() >= 0) + self.zero
        return from_rows(steps.clamp_(self.low, self.high).to(torch.int8).flatten(1), self.shape)


class _Unit:
    """A block, or a layer alone, and the rounding of its weights."""

    def __init__(
        self, module: nn.Module, name: str, layers: Mapping[str, Spec], config: QuantConfig
    ) -> None:
        self.module, self.prefix = module, f"{name}."
        self.layers = {
            layer: _Layer(self._weight(layer), spec, config) for layer, spec in layers.items()
        }
        self.learned = True

    def _inside(self, layer: str) -> str:
        return f"{layer}.".removeprefix(self.prefix)

    def _weight(self, layer: str) -> Tensor:
        return self.module.get_parameter(f"{self._inside(layer)}weight")

    def _run(self, weights: Callable[[_Layer], Tensor], call: Call) -> Tensor:
        made = {
            f"{self._inside(name)}weight": weights(layer).to(self._weight(name).dtype)
            for name, layer in self.layers.items()
        }
        return _tensor(torch.func.functional_call(self.module, made, tuple(call[0]), dict(call[1])))

    def fit(
        self, seen: Sequence[Call], wanted: Sequence[Tensor], how: Reconstruction
    ) -> tuple[float, float]:
        """Learn; mean squared errors with nearest and with the chosen rounding."""
        adam = torch.optim.Adam([layer.a for layer in self.layers.values()], lr=how.lr)
        order = torch.Generator().manual_seed(how.seed)
        first = how.warmup * how.steps
        with torch.enable_grad():
            for step in range(how.steps):
                i = int(torch.randint(len(seen), (), generator=order))
                h = {layer: layer.h() for layer in self.layers.values()}
                made = {layer: layer.weight(values) for layer, values in h.items()}
                y = self._run(made.__getitem__, seen[i])
                axis = 1 if y.dim() == 4 else -1
                loss = (y.float() - wanted[i].float()).square().sum(axis).mean()
                if step >= first:
                    b = 20 - 18 * (step - first) / (how.steps - first)
                    for values in h.values():
                        loss = loss + how.weight * (1 - (2 * values - 1).abs().pow(b)).sum()
                adam.zero_grad()
                loss.backward()
                adam.step()
        nearest = self._error(lambda layer: layer.nearest, seen, wanted)
        learned = self._error(_Layer.codes, seen, wanted)
        self.learned = learned < nearest
        return nearest, min(nearest, learned)

    @torch.no_grad()
    def _error(
        self, codes: Callable[[_Layer], Tensor], seen: Sequence[Call], wanted: Sequence[Tensor]
    ) -> float:
        def weight(layer: _Layer) -> Tensor:
            rows = to_rows(codes(layer)).reshape(*layer.s.shape[:2], -1).float()
            return from_rows(((rows - layer.zero) * layer.s).flatten(1), layer.shape)

        pairs = zip(seen, wanted, strict=True)
        found = [(self._run(weight, call) - y).double().square().mean() for call, y in pairs]
        return torch.stack(found).mean().item()

    def replace(self, model: nn.Module) -> None:
        """Put integers where the float layers are, under all their names."""
        names = aliases(model)
        for name, layer in self.layers.items():
            source: Any = model.get_submodule(name)
            codes = layer.codes() if self.learned else layer.nearest
            rounded = QUANT_TYPES[type(source)].from_codes(
                source, codes, layer.scale, layer.zero_point, layer.spec
            )
            for alias in names[name]:
                replace_module(model, alias, rounded)


def _units(model: nn.Module, layers: Sequence[str], blocks: Sequence[str]) -> dict[str, list[str]]:
    """Block or layer -> the layers in it."""
    modules = [name for name, _ in model.named_modules() if name]
    for pattern in blocks:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(
                f"reconstruct_: blocks must be patterns that match a module, got {pattern!r}, "
                f"which matches none of {len(modules)}; compare it with model.named_modules()"
            )
    units: dict[str, list[str]] = {}
    for layer in layers:
        parts = layer.split(".")
        owners = (".".join(parts[: i + 1]) for i in range(len(parts)))
        matched = (o for o in owners if any(fnmatchcase(o, pattern) for pattern in blocks))
        units.setdefault(next(matched, layer), []).append(layer)
    return units


def _executed(model: nn.Module, units: Mapping[str, Any], call: Call) -> list[str]:
    """Units in the order in which a forward pass reaches them; others are left out."""
    order: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: None if name in order else order.append(name)
        )
        for name in units
    ]
    with torch.no_grad():
        model(*call[0], **call[1])
    for handle in handles:
        handle.remove()
    return order


class _Reached(Exception):
    """The forward pass has what it was for."""


def _capture(model: nn.Module, unit: str, call: Call) -> tuple[Call, Tensor]:
    """Inputs and output of a unit in a forward pass."""
    found: list[tuple[Call, Tensor]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.append((tree_map(_kept, (args, kwargs)), _kept(_tensor(output))))
        raise _Reached

    handle = model.get_submodule(unit).register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            model(*call[0], **call[1])
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _tensor(output: Any) -> Tensor:
    """The first tensor of what a block returns."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
