# SPDX-License-Identifier: Apache-2.0
"""The gradient of `qlinear` and `qconv2d`: of x, scale, in_scale, bias and residual; the integers
are frozen.

With a = x * in_scale, codes q - z, d the gradient of what is activated, and g the group of k:

    grad_scale[n, g] = sum over k in g of (sum_m d[m, n] * a[m, k]) * (q - z)[n, k]
    grad_a[m, k] = sum_n d[m, n] * scale[n, g] * (q - z)[n, k]
    grad_x = grad_a * in_scale;  grad_in_scale[k] = sum_m grad_a[m, k] * x[m, k]

PEQA trains such a scale (arXiv 2305.14152), TuneQDM in_scale too (arXiv 2401.04339), the code of
which keeps a float copy of each weight for it. Here some rows of the weight become floating at a
time: no float tensor of the size of a weight is made. What is activated is computed anew, by the
op. Rounding of activations passes the gradient straight through (Bengio et al. 2013, arXiv
1308.3432); a is what was multiplied, rounded.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zo_kernels.ops._quantized import Call, Layer
from zo_kernels.ops._quantized_reference import along_inputs, codes
from zo_kernels.ops.quantize_rows import quantize_rows
from zo_kernels.packing import PANEL

BLOCK = 1 << 18  # codes that are floating at a time, unless a panel has more
LEAVES = ("x", "scale", "bias", "in_scale", "residual")
_DERIVATIVE = {
    "silu": torch.ops.aten.silu_backward.default,
    "gelu": torch.ops.aten.gelu_backward.default,
}


class Adjoint(NamedTuple):
    """The derivatives of a product with rows [R, K] of a weight; d [..., R] is that of its result.

    Attributes:
        weight: inputs and d to [R, K].
        inputs: rows and d to what has the shape of the inputs.
    """

    weight: Callable[[Tensor, Tensor], Tensor]
    inputs: Callable[[Tensor, Tensor], Tensor]


def setup_context(ctx: Any, call: Call, layer: Layer) -> None:
    """Keep what `gradients` needs; x only where it is multiplied again.

    Raises:
        NotImplementedError: something is perturbed, or x_scale requires a gradient.
    """
    if call.x_scale is not None and call.x_scale.requires_grad:
        raise NotImplementedError(
            f"{layer.op}: x_scale must not require a gradient, got one that does; detach it, or "
            "give floating x, whose gradient passes through the rounding"
        )
    if call.perturb != "none":
        raise NotImplementedError(
            f"{layer.op}: perturb must be 'none' where a gradient is needed, got "
            f"{call.perturb!r}; evaluate perturbations under torch.no_grad()"
        )
    given = {name: getattr(call, name) for name in LEAVES}
    ctx.wanted = {n: t.dtype for n, t in given.items() if t is not None and t.requires_grad}
    call = call._replace(residual=None)
    if call.activation == "none" and not ctx.wanted.keys() & {"scale", "in_scale"}:
        call = call._replace(x=call.x.new_empty(0))  # for its dtype
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in call))
    ctx.rest = [None if isinstance(value, Tensor) else value for value in call]
    ctx.layer = layer


def gradients(
    ctx: Any, grad: Tensor, adjoint: Callable[[int], Adjoint], again: Callable[[Call], Tensor]
) -> dict[str, Tensor]:
    """Gradient of each of `LEAVES` that wants one, in its dtype.

    Args:
        grad: of the output, [*lead, N].
        adjoint: of a product with so many independent groups of channels.
        again: evaluates a call, [*lead, N].
    """
    kept = zip(ctx.saved_tensors, ctx.rest, strict=True)
    call = Call(*(rest if tensor is None else tensor for tensor, rest in kept))
    layer: Layer = ctx.layer
    found = {"residual": grad}
    d = grad.to(call.wide)
    if call.activation != "none":
        plain = call._replace(activation="none", out_dtype=call.wide)
        d = _DERIVATIVE[call.activation](d, again(plain))
    found["bias"] = d.reshape(-1, layer.n).sum(0)
    wants_scale = "scale" in ctx.wanted
    wants_inputs = bool(ctx.wanted.keys() & {"x", "in_scale"})
    if wants_scale or wants_inputs:
        grad_scale, grad_a = _through(call, layer, d, adjoint, wants_scale, wants_inputs)
        found["scale"] = grad_scale
        found["x"] = grad_a
        if call.in_scale is not None and wants_inputs:
            found["x"] = grad_a * along_inputs(call.in_scale, layer)
        if "in_scale" in ctx.wanted:
            channels_last = (grad_a * call.x).movedim(1 if layer.per_sample else -1, -1)
            found["in_scale"] = channels_last.reshape(-1, layer.inputs).sum(0)
    return {name: found[name].to(dtype) for name, dtype in ctx.wanted.items()}


def _through(
    call: Call,
    layer: Layer,
    d: Tensor,
    adjoint: Callable[[int], Adjoint],
    wants_scale: bool,
    wants_inputs: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of scale and of a = x * in_scale, as far as they are wanted."""
    wide, dtype = call.wide, _product_dtype(call)
    a, scaled = _multiplied(call, layer, d) if wants_scale else (d, d)
    a, scaled, d = a.to(dtype), scaled.to(dtype), d.to(dtype)
    # Made first: small results between large temporaries would leave holes in the heap.
    of_scale = call.scale.new_empty((layer.n, call.scale_groups, 1), dtype=wide)
    ranges: list[Tensor] = []  # of the channels of a, one after another
    seen = -1
    for rows, channels, groups in _blocks(layer):
        q = codes(call, layer, wide, rows)
        grouped = q.view(len(q), call.scale_groups, -1)
        if wants_scale:
            some = a[:, channels] if layer.per_sample else a
            weight = adjoint(groups).weight(some, scaled[..., rows]).to(wide)
            of_scale[rows] = (weight.view_as(grouped) * grouped).sum(2, keepdim=True)
        if not wants_inputs:
            continue
        grouped *= call.scale[rows].view(len(q), call.scale_groups, 1)
        part = adjoint(groups).inputs(q.to(dtype), d[..., rows]).to(wide)
        if channels.start == seen:
            ranges[-1] += part
        else:
            ranges.append(part)
        seen = channels.start
    if len(ranges) > 1:
        ranges = [torch.cat(ranges, 1 if layer.per_sample else -1)]
    return of_scale.view(call.scale.shape), ranges[0] if ranges else d


def _multiplied(call: Call, layer: Layer, d: Tensor) -> tuple[Tensor, Tensor]:
    """What the codes are multiplied with, and d times what makes it a."""
    x, x_scale = call.x, call.x_scale
    if not call.is_integer:
        if call.in_scale is not None:
            x = x.to(call.wide) * along_inputs(call.in_scale, layer)
        return x, d
    if x_scale is None:
        x, x_scale = quantize_rows(x, layer.per_sample, call.in_scale)
    return x, d * x_scale.view(*x_scale.shape, *[1] * (d.dim() - x_scale.dim()))


def _product_dtype(call: Call) -> torch.dtype:
    return torch.bfloat16 if call.x.dtype == torch.bfloat16 else call.wide


def _blocks(layer: Layer) -> Iterator[tuple[slice, slice, int]]:
    """Output channels, the channels of x that these see, and how many independent groups those are.

    Pieces of whole panels, none above half of the weight unless that is less than a panel; where
    there are groups, a part of one or several whole.
    """
    groups = layer.inputs // layer.channels
    per_group = layer.n // groups
    step = max(PANEL, min(BLOCK // layer.k, layer.n // 2) // PANEL * PANEL)
    if per_group <= step:
        starts = [*range(0, layer.n, step // per_group * per_group)]
    else:
        firsts = range(0, layer.n, per_group)
        starts = [start for first in firsts for start in range(first, first + per_group, step)]
    for start, end in zip(starts, [*starts[1:], layer.n], strict=True):
        count = max(1, (end - start) // per_group)
        first = start // per_group * layer.channels
        yield slice(start, end), slice(first, first + count * layer.channels), count
