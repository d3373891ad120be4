# SPDX-License-Identifier: Apache-2.0
"""`add_noise_`: p <- decay * p + sum_j scales[j] * z(seed, draws[j], stream, .).

The perturbation of MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithm 1): a perturb, a flip,
and "restore + update + next perturb" are each one call. The noise is regenerated and never stored:
the memory traffic is one read and one write of p.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels import rng
from zo_kernels._registry import Backend, Example, cpp_available, define
from zo_kernels.kernels._triton import triton_available

SCHEMA = (
    "add_noise_(Tensor(a!)[] params, int[] streams, SymInt seed, SymInt[] draws, Tensor scales, "
    "Tensor decay, str kind) -> ()"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(
    params: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    scales: Tensor,
    decay: Tensor,
    kind: str,
) -> None:
    _require(kind in rng.KINDS, "kind", f"one of {rng.KINDS}", repr(kind), "choose one")
    count = len(params)
    given = len(streams)
    _require(given == count, "streams", f"{count} numbers", given, "one per parameter")
    for name, value, shape in (("scales", scales, (len(draws),)), ("decay", decay, ())):
        _require(
            value.dtype == torch.float32 and value.device.type == "cpu" and value.shape == shape,
            name,
            f"a float32 tensor {list(shape)} on the CPU",
            f"{value.dtype} {list(value.shape)} on {value.device}",
            "give one scale for each draw",
        )
    for i, (p, stream) in enumerate(zip(params, streams, strict=True)):
        name = f"params[{i}]"
        if p.dtype not in DTYPES:
            raise TypeError(
                f"add_noise_: {name} must be float32, bfloat16 or float16, got {p.dtype}; "
                "perturb the scales of a quantized weight, not its integers"
            )
        device = params[0].device
        _require(p.device == device, name, f"on {device}", p.device, "call once per device")
        limit = rng.MAX_ELEMENTS[kind]
        _require(p.numel() <= limit, name, f"at most {limit} elements", p.numel(), "split it")
        axes = zip(p.shape, p.stride(), strict=True)
        expanded = any(size > 1 and step == 0 for size, step in axes)
        _require(not expanded, name, "without expanded axes", p.stride(), "pass what was expanded")
        _require(0 <= stream <= rng.WORD, f"streams[{i}]", "in [0, 2^32)", stream, "number from 0")
    if not torch.compiler.is_compiling():  # a graph with ids in its guards serves one set of params
        distinct = len({id(p) for p in params}) == count
        _require(distinct, "params", "distinct", "one twice", "pass a tied parameter once")


def _require(ok: bool, name: str, requirement: str, got: object, advice: str) -> None:
    if not ok:
        raise ValueError(f"add_noise_: {name} must be {requirement}, got {got}; {advice}")


def add_noise_ref(
    params: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    scales: Tensor,
    decay: Tensor,
    kind: str,
) -> None:
    keep = decay.item()
    terms = list(zip(draws, scales.tolist(), strict=True))
    for p, stream in zip(params, streams, strict=True):
        flat = p.reshape(-1)  # a view, or the row-major copy of a strided tensor
        for start in range(0, flat.numel(), rng.CHUNK):
            piece = flat[start : start + rng.CHUNK]
            total = keep * piece.float()
            for draw, scale in terms:
                total += scale * rng.noise(
                    piece.shape,
                    seed=seed,
                    draw=draw,
                    stream=stream,
                    kind=kind,
                    offset=start,
                    device=p.device,
                )
            piece.copy_(total)
        if not p.is_contiguous():
            p.copy_(flat.view(p.shape))


def _fake(
    params: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    scales: Tensor,
    decay: Tensor,
    kind: str,
) -> None:
    _check(params, streams, seed, draws, scales, decay, kind)


def _device_of(params: Sequence[Tensor], *_: object) -> torch.device | None:
    return params[0].device if params else None


def _supports(params: Sequence[Tensor], *_: object) -> str | None:
    if all(p.is_contiguous() for p in params):
        return None
    return "only for contiguous parameters"


def _examples() -> Iterator[Example]:
    def numbers(*values: float) -> Tensor:
        return torch.tensor(values)

    one = torch.tensor(1.0)
    for dtype in DTYPES:
        params = [torch.linspace(-1, 1, n, dtype=dtype) for n in (1, 63, 127, 1000)]
        yield params, [0, 1, 2, 3], 42, [0], numbers(1e-3), one, "normal"
    params = [torch.linspace(-1, 1, 4097)]
    yield params, [2**32 - 1], -1, [2**40, -3], numbers(1e-3, -0.5), one * 0.9, "rademacher"
    yield [torch.ones(4, 6).t()], [3], 7, [1], numbers(1.0), one, "normal"
    yield [torch.ones(0)], [0], 0, [0], numbers(1.0), one, "normal"
    yield [torch.ones(3)], [0], 0, [], numbers(), one * 0.5, "normal"


def _triton(*args: Any) -> None:
    from zo_kernels.kernels.add_noise import add_noise__triton

    add_noise__triton(*args)


_op = define(
    SCHEMA,
    reference=add_noise_ref,
    fake=_fake,
    device_of=_device_of,
    examples=_examples,
    backends=(
        Backend("cpp", "cpu", cpp_available, _supports),
        Backend("triton", "cuda", triton_available, _supports, _triton),
    ),
)


@torch.no_grad()
def add_noise_(
    params: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    scales: Sequence[float] | Tensor,
    decay: float | Tensor = 1.0,
    kind: str = "normal",
) -> None:
    """In place: p <- decay * p + sum_j scales[j] * z(seed, draws[j], stream, .).

    Computed in fp32, in that order, and rounded to the dtype of p once. z is the noise of
    `zo_kernels.rng`, bit for bit the same on every backend and for every grouping of the params.

    Args:
        params: fp32, bf16 or fp16, any shape, all on one device. Element i is counted in row-major
            order, whatever the strides; strided ones take the reference, and a copy for the call.
        streams: for each parameter its number in [0, 2^32), for life.
        seed: 64-bit number of the run, signed or unsigned.
        draws: 64-bit numbers of the directions; none applies the decay alone.
        scales: one factor for each draw, in the unit of p; rounded to fp32. A float32 tensor on the
            CPU keeps `torch.compile` from compiling anew for each value; it is not tested for nan.
        decay: factor of p, such as 1 - lr * weight_decay; rounded to fp32. Likewise.
        kind: "normal", or "rademacher" for +1 and -1.

    Raises:
        TypeError: a parameter has another dtype.
        ValueError: lengths or devices don't match, a number is out of range or not finite, or a
            parameter comes twice or overlaps itself.

    Example:
        >>> w = torch.zeros(3)
        >>> add_noise_([w], [0], seed=1, draws=[0], scales=[1e-3])
        >>> add_noise_([w], [0], seed=1, draws=[0], scales=[-2e-3])  # the other side
    """
    params, streams, seed = list(params), list(streams), _int64("seed", seed)
    draws = [_int64("draws", draw) for draw in draws]
    if not isinstance(scales, Tensor):
        scales = _float32("scales", scales)
    if not isinstance(decay, Tensor):
        decay = _float32("decay", [decay])[0]
    _check(params, streams, seed, draws, scales, decay, kind)
    _op(params, streams, seed, draws, scales, decay, kind)


def _int64(name: str, value: int) -> int:
    """The same 64 bits as the signed number that the dispatcher takes."""
    _require(-(2**63) <= value < 2**64, name, "64-bit", value, "take it modulo 2^64")
    return value - 2**64 if value >= 2**63 else value


def _float32(name: str, values: Sequence[float]) -> Tensor:
    numbers = [float(value) for value in values]
    for value in numbers:
        _require(math.isfinite(value), name, "finite", value, "skip the step whose loss is not")
    return torch.tensor(numbers, dtype=torch.float32)
