# SPDX-License-Identifier: Apache-2.0
"""What the ops that add regenerated noise to parameters share: checks and the reference's loop."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from zo_kernels import _arithmetic, rng
from zo_kernels._registry import Backend, Op, cpp_available
from zo_kernels._xp import torch_
from zo_kernels.kernels._triton import triton_available

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
States = Mapping[str, Sequence[Tensor]]


def require(op: str, ok: bool, name: str, requirement: str, got: object, advice: str) -> None:
    if not ok:
        raise ValueError(f"{op}: {name} must be {requirement}, got {got}; {advice}")


def check(
    op: str,
    params: Sequence[Tensor],
    states: States,
    streams: Sequence[int],
    numbers: Mapping[str, tuple[Tensor, tuple[int, ...]]],
    kind: str,
    quanta: Tensor | None,
    round_draw: int | None,
) -> None:
    """Raise unless the arguments of a call fit each other; the values of tensors are not read.

    Args:
        states: by name, what the op keeps for each parameter.
        numbers: by name, fp32 tensors on the CPU and the shape that each must have.
    """
    must = partial(require, op)
    must(kind in rng.KINDS, "kind", f"one of {rng.KINDS}", repr(kind), "choose one")
    count = len(params)
    given = len(streams)
    must(given == count, "streams", f"{count} numbers", given, "one per parameter")
    if quanta is not None:
        numbers = {**numbers, "quanta": (quanta, (count,))}
    for name, (value, shape) in numbers.items():
        must(
            value.dtype == torch.float32 and value.device.type == "cpu" and value.shape == shape,
            name,
            f"a float32 tensor {list(shape)} on the CPU",
            f"{value.dtype} {list(value.shape)} on {value.device}",
            "give one for each parameter" if name == "quanta" else "give one scale for each draw",
        )
    limit = rng.MAX_ELEMENTS[kind]
    if round_draw is not None:
        limit = min(limit, rng.MAX_ELEMENTS[rng.ROUNDING])
    for i, (p, stream) in enumerate(zip(params, streams, strict=True)):
        name = f"params[{i}]"
        if p.dtype not in DTYPES:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16 or float16, got {p.dtype}; "
                "perturb the scales of a quantized weight, not its integers"
            )
        device = params[0].device
        must(p.device == device, name, f"on {device}", p.device, "call once per device")
        must(p.numel() <= limit, name, f"at most {limit} elements", p.numel(), "split it")
        axes = zip(p.shape, p.stride(), strict=True)
        expanded = any(size > 1 and step == 0 for size, step in axes)
        must(not expanded, name, "without expanded axes", p.stride(), "pass what was expanded")
        must(0 <= stream <= rng.WORD, f"streams[{i}]", "in [0, 2^32)", stream, "number from 0")
    for name, tensors in states.items():
        given = len(tensors)
        must(given == count, name, f"{count} tensors", given, "one per parameter")
        for i, (p, x) in enumerate(zip(params, tensors, strict=True)):
            fits = x.dtype == torch.float32 and x.shape == p.shape and x.device == p.device
            must(
                fits and x.is_contiguous(),
                f"{name}[{i}]",
                f"contiguous float32 {list(p.shape)} on {p.device}",
                f"{x.dtype} {list(x.shape)} of strides {x.stride()} on {x.device}",
                "make it by torch.zeros(p.shape, device=p.device)",
            )
    if not torch.compiler.is_compiling():  # a graph with ids in its guards serves one set of params
        everything = [*params, *(x for tensors in states.values() for x in tensors)]
        distinct = len({id(x) for x in everything}) == len(everything)
        must(distinct, "params", "distinct", "one twice", "pass a tied parameter once")


def reference(
    rule: Callable[..., Any],
    params: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    factors: Tensor,
    hyper: Tensor,
    kind: str,
    quanta: Tensor | None,
    round_draw: int | None,
) -> None:
    """`rule` of `zo_kernels._arithmetic` on every parameter, in place."""
    quantum = [0.0] * len(params) if quanta is None else quanta.tolist()
    for i, (p, stream) in enumerate(zip(params, streams, strict=True)):
        flat = p.reshape(-1)  # a view, or the row-major copy of a strided tensor
        where: dict[str, Any] = {"seed": seed, "stream": stream, "device": p.device}
        _arithmetic.update(
            torch_(),
            rule,
            flat,
            [x[i].view(-1) for x in states],
            dtype=str(p.dtype).removeprefix("torch."),
            noise=partial(rng.noise, kind=kind, **where),
            round_bits=partial(rng.round_bits, **where),
            draws=draws,
            factors=factors.tolist(),
            hyper=hyper.reshape(-1).tolist(),
            quantum=quantum[i],
            round_draw=round_draw,
        )
        if not p.is_contiguous():
            p.copy_(flat.view(p.shape))


def device_of(params: Sequence[Tensor], *_: object) -> torch.device | None:
    return params[0].device if params else None


def _supports(params: Sequence[Tensor], *_: object) -> str | None:
    if all(p.is_contiguous() for p in params):
        return None
    return "only for contiguous parameters"


def examples() -> Iterator[tuple[list[Tensor], list[int], int, list[int], Tensor, str, Any, Any]]:
    """params, streams, seed, draws, factors, kind, quanta, round_draw, on the CPU."""

    def numbers(*values: float) -> Tensor:
        return torch.tensor(values)

    for dtype in DTYPES:
        params = [torch.linspace(-1, 1, n, dtype=dtype) for n in (1, 63, 127, 1000)]
        rounding = None if dtype == torch.float32 else 2**50
        yield params, [0, 1, 2, 3], 42, [0], numbers(1e-3), "normal", None, rounding
    draws, factors = [2**40, 2**40, -3], numbers(1e-3, 2.0, -0.5)
    grid = numbers(2.0**-20)
    yield [torch.linspace(-1, 1, 4097)], [2**32 - 1], -1, draws, factors, "rademacher", grid, None
    yield [torch.ones(4, 6).t()], [3], 7, [1], numbers(1.0), "normal", None, None
    yield [torch.ones(0)], [0], 0, [0], numbers(1.0), "normal", None, None
    yield [torch.ones(3)], [0], 0, [], numbers(), "normal", None, None


def int64(op: str, name: str, value: int) -> int:
    """The same 64 bits as the signed number that the dispatcher takes."""
    if -(2**63) <= value < 2**63:
        return value
    require(op, 0 <= value < 2**64, name, "64-bit", value, "take it modulo 2^64")
    return value - 2**64


def float32(op: str, name: str, values: Sequence[float]) -> Tensor:
    numbers = [float(value) for value in values]
    for value in numbers:
        ok = math.isfinite(value)
        require(op, ok, name, "finite", value, "skip the step whose loss is not")
    return torch.tensor(numbers, dtype=torch.float32)


def grids(op: str, params: Sequence[Tensor], quanta: Sequence[float] | Tensor | None) -> Any:
    """`quanta` as the tensor that the op takes; the numbers of a sequence are checked."""
    if quanta is None or isinstance(quanta, Tensor):
        return quanta
    least, largest = _arithmetic.LEAST_QUANTUM, _arithmetic.LARGEST_QUANTUM
    for i, quantum in enumerate(quanta):
        on_grid = quantum == 0 or (least <= quantum <= largest and math.frexp(quantum)[0] == 0.5)
        require(
            *(op, on_grid, f"quanta[{i}]", "0 or a power of two from 2^-126 to 2^100", quantum),
            "round it to one",
        )
        if quantum and i < len(params):
            fp32 = params[i].dtype == torch.float32
            got = f"{quantum} for {params[i].dtype}"
            advice = "round 16-bit weights by round_draw"
            require(op, fp32, f"quanta[{i}]", "0 where the parameter is not float32", got, advice)
    return torch.tensor([float(q) for q in quanta], dtype=torch.float32)


def normalized(
    op: str,
    params: Sequence[Tensor],
    streams: Sequence[int],
    seed: int,
    draws: Sequence[int],
    quanta: Sequence[float] | Tensor | None,
    round_draw: int | None,
) -> tuple[list[Tensor], list[int], int, list[int], Tensor | None, int | None]:
    """The arguments that every update op has, as its schema wants them."""
    params = list(params)
    return (
        params,
        list(streams),
        int64(op, "seed", seed),
        [int64(op, "draws", draw) for draw in draws],
        grids(op, params, quanta),
        None if round_draw is None else int64(op, "round_draw", round_draw),
    )


def run_at(op: Op, args: Sequence[Any], base: Tensor, draws: Tensor) -> None:
    """Runs an update op on numbers that lie where its parameters do: it reads them when it runs,
    and a captured graph anew at each replay.

    Args:
        op: `add_noise_`, `zo_sgd_` or `zo_adam_`.
        args: of its schema, checked, the factors and hyperparameters on the device of the params;
            `draws` and `round_draw` count from `base`.
        base: int64 [1]; draws: int64 [T + 1], `draws` and then `round_draw` or 0. On the device.

    Raises:
        RuntimeError: no kernel on that device reads its numbers there.
    """
    device = device_of(*args)
    if device is None:
        return
    if device.type == "cpu":
        first, given = int(base), list(args)
        for i, argument in enumerate(op.overload._schema.arguments):
            if argument.name == "draws":
                given[i] = [first + draw for draw in given[i]]
            elif argument.name == "round_draw" and given[i] is not None:
                given[i] += first
        op(*given)
        return
    chosen = op.choose(args)
    kernels = [b.kernel for b in op.backends if b.name == chosen and b.kernel is not None]
    if not kernels:
        raise RuntimeError(
            f"{op.name}: the backend must read its numbers on the device, got {chosen!r} on "
            f"{device}; use contiguous parameters and Triton, or no graph"
        )
    kernels[0](*args, at=(base, draws))


def backends(name: str) -> tuple[Backend, Backend]:
    """C++, which registers its own kernel, and Triton, whose file is imported at the first call."""

    def launch(*args: Any, **more: Any) -> None:
        module = import_module(f"zo_kernels.kernels.{name.rstrip('_')}")
        getattr(module, f"{name}_triton")(*args, **more)

    return (
        Backend("cpp", "cpu", cpp_available, _supports),
        Backend("triton", "cuda", triton_available, _supports, launch),
    )
