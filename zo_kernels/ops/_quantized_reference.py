# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `qlinear` and `qconv2d` in plain torch.

Where activations are integers every step is an exact integer operation or one correctly rounded
fp32 operation, in the order written here and never contracted to fma; kernels repeat it to the bit:

    acc_g[m, n] = sum over k in group g of a[m, k] * (q[n, k] - z[n, g])
    y = acc_0 * scale[n, 0] + acc_1 * scale[n, 1] + ...;  y = y * x_scale[m];  y = y + bias[n]
    y = activation(y);  y = y + residual

A perturbation of coefficient c changes that to

    "scale"           scale + c * z
    "scale_relative"  scale * (1 + c * z)
    "weight"          float(acc_g) + c * float(accR_g), accR_g = sum of a[m, k] * R[n, k]
    "codes"           float(unit * acc_g + c * accR_g) and scale * (1 / unit), where a step of a
                      code has 1 unit (8 bits) or 16 (4 bits)

fp64 holds the integer sums exactly, whatever the order that a matrix product adds them in.
Otherwise the product runs in the dtype of x where the output has it too, else in fp32.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_kernels import rng
from zo_kernels.ops._quantized import LANES, Call, Layer, check_steps
from zo_kernels.ops.quantize_rows import quantize_rows_ref
from zo_kernels.packing import PANEL, unpack_rows

# Inputs [B, ...] and codes [N, K] to the sums over each group of k, [..., N] each.
Products = Callable[[Tensor, Tensor, int], Iterable[Tensor]]
ACTIVATION = {"none": lambda y: y, "silu": F.silu, "gelu": F.gelu}


def outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function` as if autocast were off: the dtype of x decides, as the schema says.

    Autocast would reach the matmul inside a reference and run unscaled sums in float16.
    """

    @wraps(function)
    def wrapper(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapper


def evaluate(call: Call, layer: Layer, products: Products) -> Tensor:
    """[*lead, N], contiguous; `residual` of the call lies the same way."""
    a, x_scale, dtype = _activations(call, layer)
    q = codes(call, layer, dtype)
    out = call.x.new_empty((*layer.lead, layer.n), dtype=call.result_dtype)
    for rows, draw, c in _parts(call, layer):
        sums, scale = _sums(call, products, a[rows], q), call.scale
        if call.perturb.startswith("scale"):
            change = c * _noise(call, draw, scale.shape)
            scale = scale + change if call.perturb == "scale" else scale * (1.0 + change)
        elif call.perturb != "none":
            unit = LANES[call.bits] if call.perturb == "codes" else 1  # steps of a code
            signs = _noise(call, draw, (layer.n, layer.k)).to(dtype)
            both = zip(sums, _sums(call, products, a[rows], signs), strict=True)
            sums = (_moved(call, plain, sign, c, unit) for plain, sign in both)
            if call.is_integer:
                scale = scale * (1 / unit)
        per_row = None if x_scale is None else x_scale[rows]
        residual = None if call.residual is None else call.residual[rows]
        out[rows] = _epilogue(call, sums, scale, per_row, residual)
    return out


def _parts(call: Call, layer: Layer) -> Iterator[tuple[Any, int, float]]:
    """Samples, draw and coefficient of each perturbation; all samples where there is none."""
    if call.coeffs is None:
        yield ..., 0, 0.0
        return
    if call.perturb == "codes":
        check_steps(layer.op, call.coeffs, call.headroom)
    size = call.x.shape[0] // len(call.draws)
    for p, (draw, c) in enumerate(zip(call.draws, call.coeffs.tolist(), strict=True)):
        yield slice(p * size, (p + 1) * size), draw, c


def _noise(call: Call, draw: int, shape: Sequence[int]) -> Tensor:
    where: dict[str, Any] = {"seed": call.seed, "draw": draw, "stream": call.stream}
    return rng.noise(shape, kind=call.kind, device=call.x.device, **where)


def _sums(call: Call, products: Products, a: Tensor, weight: Tensor) -> Iterable[Tensor]:
    sums = products(a, weight, call.scale_groups)
    if not call.is_integer:
        return sums
    # Rounded for convolutions by way of a transform, which miss the integer by a little.
    return (acc.round().to(torch.int32) for acc in sums)


def _activations(call: Call, layer: Layer) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """What is multiplied, its scale where it is integers, and the dtype of the product."""
    x, x_scale = call.x, call.x_scale
    if call.is_integer:
        if x_scale is None:
            x, x_scale = quantize_rows_ref(x, layer.per_sample, call.in_scale)
        return x.double(), x_scale, torch.float64
    # fp16 overflows at 65504, which unscaled sums do reach.
    keeps = x.dtype == call.result_dtype == torch.bfloat16
    dtype = torch.bfloat16 if keeps else call.wide
    if call.in_scale is not None:
        x = x.to(call.wide) * along_inputs(call.in_scale, layer)
    return x.to(dtype), None, dtype


def along_inputs(vector: Tensor, layer: Layer) -> Tensor:
    return vector.view(-1, 1, 1) if layer.per_sample else vector


def codes(call: Call, layer: Layer, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
    """q - z of some rows, all by default, [R, K]: integers up to 255, exact in bf16. Lives for one
    call."""
    first, end = (rows.start, rows.stop) if rows is not None else (0, layer.n)
    skipped = first % PANEL
    panels = call.qweight[first // PANEL : -(-end // PANEL)]
    count = end - first
    q = unpack_rows(panels, skipped + count, layer.taps, layer.channels, call.bits)[skipped:]
    values = q.flatten(1).to(dtype)
    if call.zero_point is not None:
        zero_point = call.zero_point[first:end].to(dtype).view(count, -1, 1)
        values.view(count, call.scale_groups, -1).sub_(zero_point)
    return values


def _moved(call: Call, sums: Tensor, signs: Tensor, c: float, unit: int) -> Tensor:
    """The sums over codes that were moved by c R / unit; in units of that where they are exact."""
    if not call.is_integer:
        return sums.to(call.wide) + (c / unit) * signs.to(call.wide)
    if call.perturb == "codes":
        return unit * sums + int(c) * signs
    return sums.float() + c * signs.float()


def _epilogue(
    call: Call,
    sums: Iterable[Tensor],
    scale: Tensor,
    x_scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    columns = scale.view(scale.shape[0], -1).unbind(1)
    terms = (acc.to(call.wide) * s for acc, s in zip(sums, columns, strict=True))
    y = next(terms)
    for term in terms:
        y += term
    if x_scale is not None:
        y *= x_scale.view(*x_scale.shape, *[1] * (y.dim() - x_scale.dim()))
    if call.bias is not None:
        y += call.bias.to(call.wide)
    y = ACTIVATION[call.activation](y)
    return y if residual is None else y + residual.to(call.wide)
