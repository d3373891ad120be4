# SPDX-License-Identifier: Apache-2.0
"""`perturbed`: evaluate a quantized model with perturbed weights, without touching a weight."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import rng
from zo_kernels.nn._base import QuantModule
from zo_kernels.nn._choose import chosen
from zo_kernels.ops import add_noise_

WHATS = ("scale", "scale_relative", "weight", "codes")
_HELP = {8: "quantize with QuantConfig(headroom=...)", 4: "round to symmetric 4 bits"}


def streams_of(model: nn.Module) -> dict[str, int]:
    """The noise stream of each quantized module of `model`, by name: its place among the quantized
    modules in the order of `model.named_modules()`, from 0.

    It does not depend on which of them are perturbed, nor on the other modules. A module that the
    model holds under several names has one stream, under the first.
    """
    names = (name for name, m in model.named_modules() if isinstance(m, QuantModule))
    return {name: stream for stream, name in enumerate(names)}


def input_stream(stream: int) -> int:
    """The noise stream of the `in_scale` of a module whose weight has `stream`: the other half of
    the 32-bit numbers."""
    return stream ^ 1 << 31


@contextmanager
def perturbed(
    model: nn.Module,
    *,
    seed: int,
    draws: Sequence[int],
    coeffs: Sequence[float] | Tensor,
    what: str = "scale",
    kind: str = "rademacher",
    inputs: bool = False,
    names: Sequence[str] = ("*",),
    streams: Mapping[str, int] | None = None,
) -> Iterator[dict[str, int]]:
    """Within the block, quantized modules compute with perturbed weights: P perturbations in one
    forward pass, each for its share of the batch.

    A batch of B samples (the first axis of each module's input) is read as P equal parts; part p
    sees coefficient coeffs[p] times the noise of draws[p]. Nothing is written: the noise is
    generated inside the product, by `zo_kernels.ops.qlinear` and `qconv2d`, which say what each
    `what` means bit for bit. After the block, or an error in it, the modules are as before.

    Example:
        >>> with perturbed(unet, seed=7, draws=[step, step], coeffs=[eps, -eps]):
        ...     plus, minus = unet(latents.repeat(2, 1, 1, 1), t, text.repeat(2, 1, 1)).chunk(2)

    Args:
        model: contains quantized modules.
        seed: of the run, 64 bits.
        draws: P numbers of 64 bits, which direction each part takes.
        coeffs: P finite numbers; taken in fp32.
        what: "scale": scale + c z. "scale_relative": scale (1 + c z). "weight": W + c R in units of
            a code, R random signs. "codes": the same in whole steps, c an integer within the
            headroom of every module (a step is 1 code with 8 bits, 1/16 with 4).
        kind: of the noise on scales, "rademacher" or "normal"; weights and codes take signs.
        inputs: perturb every `in_scale` as well, in the way that `what` says of scales; the factors
            of the parts are multiplied before the op. Its stream is `input_stream` of the module's.
        names: patterns (`fnmatch`) on the modules' names in `model`; the others stay as they are.
        streams: name -> noise stream, for every module chosen; default `streams_of(model)`. Give
            two models that run together different streams.

    Yields:
        name -> stream of the modules that are perturbed.

    Raises:
        ValueError: an argument is out of range, a pattern matches no quantized module, the codes of
            one have no room, or inputs is set where there is no `in_scale`.
        RuntimeError: a module is perturbed already.
    """
    factors = torch.as_tensor(coeffs, dtype=torch.float32, device="cpu").detach().clone()
    _check(seed, draws, factors, what, kind)
    modules = chosen(model, names, "perturbed")
    streams = streams_of(model) if streams is None else streams
    used = {name: _stream(streams, name) for name in modules}
    for name, module in modules.items():
        _check_module(name, module, what, factors)
    if inputs:
        some = what.startswith("scale") and any(m.in_scale is not None for m in modules.values())
        advice = "perturb scales, and give the modules an in_scale by trainable_scales"
        _must(some, "inputs", "False unless scales of modules with in_scale are", True, advice)
    try:
        for name, module in modules.items():
            module.perturbation = {
                "perturb": what,
                "kind": kind if what.startswith("scale") else "rademacher",
                "seed": seed,
                "stream": used[name],
                "draws": tuple(draws),
                "coeffs": factors,
                "headroom": module.headroom if what == "codes" else 0,
            }
            if inputs and module.in_scale is not None:
                module.in_scales = _in_scales(module.in_scale, module.perturbation)
        yield used
    finally:
        for module in modules.values():
            module.perturbation, module.in_scales = {}, None


def _check(seed: int, draws: Sequence[int], factors: Tensor, what: str, kind: str) -> None:
    _must(what in WHATS, "what", f"one of {', '.join(WHATS)}", repr(what), "choose one")
    _must(kind in rng.KINDS, "kind", f"one of {', '.join(rng.KINDS)}", repr(kind), "choose one")
    for name, value in (("seed", seed), *(("draws", draw) for draw in draws)):
        _must(-(2**63) <= value < 2**64, name, "64-bit", value, "take it modulo 2^64")
    _must(len(draws) > 0, "draws", "at least one number", "none", "give one for each perturbation")
    fits = factors.shape == (len(draws),)
    _must(
        fits, "coeffs", f"{len(draws)} numbers", list(factors.shape), "give one for each of draws"
    )
    values = factors.tolist()
    _must(
        bool(torch.isfinite(factors).all()), "coeffs", "finite", values, "skip such a perturbation"
    )
    whole = what != "codes" or bool((factors == factors.round()).all())
    _must(whole, "coeffs", "integers for codes", values, 'count steps, or use what="weight"')


@torch.no_grad()
def _in_scales(in_scale: Tensor, how: Mapping[str, Any]) -> Tensor:
    """[P, inputs]: the factors of each part of a batch, in the bits of a perturbed scale."""
    relative = how["perturb"] == "scale_relative"
    start = torch.ones_like(in_scale) if relative else in_scale.detach()
    rows = start.repeat(len(how["draws"]), 1)
    stream, seed, kind = input_stream(how["stream"]), how["seed"], how["kind"]
    for row, draw, c in zip(rows, how["draws"], how["coeffs"].tolist(), strict=True):
        add_noise_([row], [stream], seed, [draw], [c], kind=kind)
    return rows.mul_(in_scale) if relative else rows


def _stream(streams: Mapping[str, int], name: str) -> int:
    stream = streams.get(name)
    fits = stream is not None and 0 <= stream <= rng.WORD
    _must(
        fits, "streams", f"in [0, 2^32) for every module, {name!r} too", stream, "give it a number"
    )
    assert stream is not None
    return stream


def _check_module(name: str, module: QuantModule, what: str, factors: Tensor) -> None:
    if module.perturbation:
        raise RuntimeError(
            f"perturbed: model must not be perturbed already, got {name!r}, which is; "
            "leave the outer block first, or give all draws and coeffs to one"
        )
    if what == "codes":
        steps = int(factors.abs().max())
        asymmetric = module.zero_point is not None
        _must(
            steps <= module.headroom and not asymmetric,
            "coeffs",
            f"at most the headroom of {name!r} for codes, which is {module.headroom}",
            steps,
            f'{_HELP[module.spec.bits]}, or use what="weight"',
        )


def _must(ok: Any, name: str, requirement: str, got: object, advice: str) -> None:
    if not ok:
        raise ValueError(f"perturbed: {name} must be {requirement}, got {got}; {advice}")
