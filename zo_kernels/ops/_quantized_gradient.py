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


class Block(NamedTuple):
    """Some output channels.

    Attributes:
        rows: which.
        channels: those of x that they see.
        groups: how many independent groups of channels these are.
    """

    rows: slice
    channels: slice
    groups: int


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
    if "scale" in ctx.wanted:
        found["scale"] = _of_scale(call, layer, d, adjoint)
    if ctx.wanted.keys() & {"x", "in_scale"}:
        grad_a = found["x"] = _of_inputs(call, layer, d, adjoint)
        if call.in_scale is not None:
            found["x"] = grad_a * along_inputs(call.in_scale, layer)
        if "in_scale" in ctx.wanted:
            channels_last = (grad_a * call.x).movedim(1 if layer.per_sample else -1, -1)
            found["in_scale"] = channels_last.reshape(-1, layer.inputs).sum(0)
    return {name: found[name].to(dtype) for name, dtype in ctx.wanted.items()}


def _of_scale(call: Call, layer: Layer, d: Tensor, adjoint: Callable[[int], Adjoint]) -> Tensor:
    x, x_scale, dtype = call.x, call.x_scale, _product_dtype(call)
    if call.is_integer:
        if x_scale is None:
            x, x_scale = quantize_rows(x, layer.per_sample, call.in_scale)
        d = d * x_scale.view(*x_scale.shape, *[1] * (d.dim() - x_scale.dim()))
    elif call.in_scale is not None:
        x = x.to(call.wide) * along_inputs(call.in_scale, layer)
    a, d = x.to(dtype), d.to(dtype)
    # Made first: small results between large temporaries would leave holes in the heap.
    found = call.scale.new_empty((layer.n, call.scale_groups), dtype=call.wide)
    for block in _blocks(layer):
        seen = a[:, block.channels] if layer.per_sample else a
        weight = adjoint(block.groups).weight(seen, d[..., block.rows]).to(call.wide)
        weight = weight * codes(call, layer, call.wide, block.rows)
        found[block.rows] = weight.view(len(weight), call.scale_groups, -1).sum(2)
    return found.view(call.scale.shape)


def _of_inputs(call: Call, layer: Layer, d: Tensor, adjoint: Callable[[int], Adjoint]) -> Tensor:
    """Of a = x * in_scale."""
    dtype = _product_dtype(call)
    d = d.to(dtype)
    ranges: list[Tensor] = []  # of the channels, one after another
    seen = -1
    for block in _blocks(layer):
        q = codes(call, layer, call.wide, block.rows)
        scale = call.scale[block.rows].view(len(q), call.scale_groups, 1)
        weight = q.view(len(q), call.scale_groups, -1).mul_(scale).view_as(q).to(dtype)
        part = adjoint(block.groups).inputs(weight, d[..., block.rows]).to(call.wide)
        if block.channels.start == seen:
            ranges[-1] += part
        else:
            ranges.append(part)
        seen = block.channels.start
    if len(ranges) == 1:
        return ranges[0]
    return torch.cat(ranges, 1 if layer.per_sample else -1)


def _product_dtype(call: Call) -> torch.dtype:
    return torch.bfloat16 if call.x.dtype == torch.bfloat16 else call.wide


def _blocks(layer: Layer) -> Iterator[Block]:
    """The weight in pieces of whole panels, none above a quarter of it unless that is less than a
    panel; where groups of channels are independent, of a part of a group or of several whole."""
    groups = layer.inputs // layer.channels
    per_group = layer.n // groups
    step = max(PANEL, min(BLOCK // layer.k, layer.n // 4) // PANEL * PANEL)
    if per_group <= step:
        starts = [*range(0, layer.n, step // per_group * per_group)]
    else:
        firsts = range(0, layer.n, per_group)
        starts = [start for first in firsts for start in range(first, first + per_group, step)]
    for start, end in zip(starts, [*starts[1:], layer.n], strict=True):
        count = max(1, (end - start) // per_group)
        first = start // per_group * layer.channels
        yield Block(slice(start, end), slice(first, first + count * layer.channels), count)
