# SPDX-License-Identifier: Apache-2.0
"""`qconv2d`: `qlinear`'s twin for 2-d convolutions (cross-correlations, padded with zeros).

Element k = (r * kw + s) * C + c of a row is channel c of tap (r, s), the order of a channels_last
picture. That order counts for groups of scales and for the noise of a perturbed weight.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from zo_kernels._registry import Example, define
from zo_kernels.ops import _quantized
from zo_kernels.ops._quantized import Call, Layer, refusal
from zo_kernels.ops._quantized_backend import backends, launch, supports_qconv2d
from zo_kernels.ops._quantized_examples import examples
from zo_kernels.ops._quantized_gradient import Adjoint, gradients, setup_context
from zo_kernels.ops._quantized_reference import evaluate, outside_autocast

SCHEMA = (
    "qconv2d(Tensor x, Tensor qweight, Tensor scale, Tensor? zero_point=None, Tensor? bias=None, "
    "int[2] kernel_size=1, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, "
    f"{_quantized.SCHEMA_TAIL}) -> Tensor"
)


class Geometry(NamedTuple):
    """What the schema has between `bias` and `bits`; pairs are (vertical, horizontal)."""

    kernel_size: Sequence[int] = (1, 1)
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """H', W' for a picture of H, W."""
        (height, width), (kh, kw), (down, right) = size, self.kernel_size, self.stride
        (above, beside), (apart, aside) = self.padding, self.dilation
        return (
            (height + 2 * above - apart * (kh - 1) - 1) // down + 1,
            (width + 2 * beside - aside * (kw - 1) - 1) // right + 1,
        )


LEAST = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}


def _split(args: Sequence[Any]) -> tuple[Call, Geometry]:
    return Call(*args[:5], *args[10:]), Geometry(*args[5:10])


def _layer(call: Call, geometry: Geometry) -> Layer:
    batch, inputs, *size = call.x.shape
    lead = (batch, *geometry.output_size(size))
    (kh, kw), channels = geometry.kernel_size, inputs // geometry.groups
    return Layer("qconv2d", call.scale.shape[0], kh * kw, channels, lead, inputs, per_sample=True)


def _check(call: Call, geometry: Geometry) -> None:
    op, shape, groups = "qconv2d", call.x.shape, geometry.groups
    _quantized.check_operands(op, call, len(shape) == 4 and shape[1] > 0, "[B, C, H, W]")
    for (name, least), pair in zip(LEAST.items(), geometry[:4], strict=True):
        if min(pair) < least:
            requirement, advice = f"at least {least}", "copy it from the float layer"
            raise ValueError(refusal(op, name, requirement, tuple(pair), advice))
    outputs, inputs = call.scale.shape[0], shape[1]
    if groups < 1 or outputs % groups or inputs % groups:
        requirement = f"positive and divide {inputs} input and {outputs} output channels"
        raise ValueError(refusal(op, "groups", requirement, groups, "copy it from the float layer"))
    for axis, size, pad, gap, kernel in zip(
        ("high", "wide"),
        *(shape[2:], geometry.padding, geometry.dilation, geometry.kernel_size),
        strict=True,
    ):
        span = gap * (kernel - 1) + 1
        if size < 1 or size + 2 * pad < span:
            least = max(1, span - 2 * pad)
            requirement = f"at least {least} {axis} for this kernel"
            raise ValueError(refusal(op, "x", requirement, size, "pad it or use a larger picture"))
    _quantized.check(call, _layer(call, geometry))


def _products(geometry: Geometry) -> Callable[[Tensor, Tensor, int], Iterator[Tensor]]:
    """The sums of a convolution, [B, H', W', N] each: one for each tap and range of channels where
    a weight has groups of k."""
    (kh, kw), groups = geometry.kernel_size, geometry.groups
    rest = (geometry.stride, geometry.padding, geometry.dilation, groups)

    def products(a: Tensor, weight: Tensor, parts: int) -> Iterator[Tensor]:
        weight = _as_image(weight, geometry)
        if parts == 1:
            yield F.conv2d(a, weight, None, *rest).permute(0, 2, 3, 1)
            return
        height, width = geometry.output_size(a.shape[2:])
        (down, right), (below, beside) = geometry.stride, geometry.dilation
        a = F.pad(a, (geometry.padding[1],) * 2 + (geometry.padding[0],) * 2)
        a = a.unflatten(1, (groups, -1))
        size = weight.shape[1] * kh * kw // parts
        for tap in range(kh * kw):
            top, left = tap // kw * below, tap % kw * beside
            rows = slice(top, top + (height - 1) * down + 1, down)
            seen = a[..., rows, left : left + (width - 1) * right + 1 : right]
            for c in range(0, weight.shape[1], size):
                some = weight[:, c : c + size, tap // kw, tap % kw, None, None]
                part = seen[:, :, c : c + size].flatten(1, 2)
                yield F.conv2d(part, some, groups=groups).permute(0, 2, 3, 1)

    return products


def _as_image(weight: Tensor, geometry: Geometry) -> Tensor:
    """[N, K] -> [N, C, kh, kw]."""
    return weight.unflatten(1, (*geometry.kernel_size, -1)).permute(0, 3, 1, 2)


@outside_autocast
def qconv2d_ref(*args: Any) -> Tensor:
    call, geometry = _split(args)
    if call.residual is not None:
        call = call._replace(residual=call.residual.permute(0, 2, 3, 1))
    y = evaluate(call, _layer(call, geometry), _products(geometry))
    return y.permute(0, 3, 1, 2)


def _triton(*args: Any) -> Tensor:
    y: Tensor = launch("qconv2d", *_split(args))
    return y


def _fake(*args: Any) -> Tensor:
    call, geometry = _split(args)
    _check(call, geometry)
    layer = _layer(call, geometry)
    y = call.x.new_empty((*layer.lead, layer.n), dtype=call.result_dtype)
    return y.permute(0, 3, 1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    call, geometry = _split(inputs)
    setup_context(ctx, call, _layer(call, geometry))
    ctx.geometry, ctx.shape = geometry, call.x.shape


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    geometry: Geometry = ctx.geometry
    batch, _, *size = ctx.shape

    def adjoint(groups: int) -> Adjoint:
        rest = (geometry.stride, geometry.padding, geometry.dilation, groups)

        def weight(a: Tensor, d: Tensor) -> Tensor:
            shape = (d.shape[-1], a.shape[1] // groups, *geometry.kernel_size)
            image = conv2d_weight(a, shape, d.permute(0, 3, 1, 2), *rest)
            return image.permute(0, 2, 3, 1).flatten(1)

        def inputs(weight: Tensor, d: Tensor) -> Tensor:
            image = _as_image(weight, geometry)
            shape = (batch, groups * image.shape[1], *size)
            return conv2d_input(shape, image, d.permute(0, 3, 1, 2), *rest)

        return Adjoint(weight, inputs)

    def again(call: Call) -> Tensor:
        y: Tensor = _op(*call[:5], *geometry, *call[5:])
        return y.permute(0, 2, 3, 1)

    found = gradients(ctx, grad.permute(0, 2, 3, 1), adjoint, again)
    if "residual" in found:
        found["residual"] = found["residual"].permute(0, 3, 1, 2)
    names = (*Call._fields[:5], *Geometry._fields, *Call._fields[5:])
    return tuple(found.get(name) for name in names)


def _examples() -> Iterator[Example]:
    padded = Geometry([3, 3], [2, 2], [1, 1])

    def example(call: Call, geometry: Geometry = padded) -> Example:
        return *call[:5], *geometry, *call[5:]

    for weight, dtype, noise in examples((8, 6, 3, 3), (1, 18, 1, 9)):
        x = torch.linspace(-1, 1, 2 * 6 * 7 * 9).to(dtype).view(2, 6, 7, 9)
        for act_bits in (16, 8):
            plain = Call(x, **weight, act_bits=act_bits)
            yield example(plain._replace(bias=torch.linspace(-1, 1, 8).to(dtype)))
            yield example(plain._replace(**noise))
        codes = x.mul(127).to(torch.int8)
        yield example(plain._replace(x=codes, x_scale=torch.linspace(0.5, 1, 2)))
    more: dict[str, Any] = {"in_scale": torch.linspace(0.5, 2, 6), "activation": "silu"}
    more |= {"residual": torch.ones(2, 8, 4, 5).half(), "out_dtype": torch.bfloat16}
    yield example(plain._replace(**more))
    x = x.float()
    halves = Geometry([3, 3], [1, 2], [2, 1], [2, 1], 2)
    for changed in (x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:0]):
        yield example(plain._replace(x=changed))
    yield example(plain._replace(x=torch.cat([x, x], 1), act_bits=16), halves)
    trained = x.clone().requires_grad_()
    yield example(plain._replace(x=trained, bias=torch.ones(8, requires_grad=True)))
    more = {"residual": torch.ones(2, 8, 4, 5, requires_grad=True), "in_scale": torch.ones(6)}
    yield example(plain._replace(x=trained, act_bits=16, activation="gelu", **more))
    scales = {"scale": plain.scale.clone(), "in_scale": torch.ones(6)}
    trained_scales: dict[str, Any] = {k: s.requires_grad_() for k, s in scales.items()}
    yield example(plain._replace(x=trained, act_bits=16, **trained_scales))


_op = define(
    SCHEMA,
    reference=qconv2d_ref,
    fake=_fake,
    device_of=lambda x, *_: x.device,
    examples=_examples,
    backends=backends("qconv2d", supports_qconv2d, _triton),
    backward=_backward,
    setup_context=_setup_context,
)


def qconv2d(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    kernel_size: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    bits: int = 8,
    act_bits: int = 16,
    x_scale: Tensor | None = None,
    in_scale: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    perturb: str = "none",
    kind: str = "rademacher",
    seed: int = 0,
    stream: int = 0,
    draws: Sequence[int] = (),
    coeffs: Sequence[float] | Tensor | None = None,
    headroom: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A 2-d convolution whose weight w = scale * (q - zero_point) is stored as integers q:
    y = activation(conv2d(x, w) + bias) + residual.

    What is said of `qlinear` holds here too, with these differences: activations have one scale
    for each picture of the batch, the K = kh * kw * C inputs of an output are in the order of tap
    and then channel, and the result is channels_last, whatever x is.

    Args:
        x: fp32, bf16, fp16 or fp64 [B, C, H, W], any strides; or int8 codes with `x_scale`.
        qweight: uint8, the codes q [N, C / groups, kh, kw] as `zo_kernels.packing.pack` lays them
            out.
        scale: fp32 [N], or [N, G] for G groups of K / G inputs, which divide the channels of a tap.
        zero_point: int8 in the shape of scale, the code of weight 0; None is 0.
        bias: floating [N]; None is 0.
        kernel_size, stride, padding, dilation: pixels, one int or (vertical, horizontal).
        groups: number of independent groups of channels.
        x_scale: fp32 [B], one for each picture of int8 x.
        in_scale: fp32 [C], multiplied to floating x first.
        bits, act_bits, activation, residual, perturb, kind, seed, stream, draws, coeffs, headroom,
            out_dtype: see `qlinear`; the noise of a weight is counted over [N, kh, kw, C / groups].

    Returns:
        [B, N, H', W'], channels_last. Pictures that hold NaN or infinity come out as NaN with
        act_bits=8.

    Raises:
        TypeError, ValueError, NotImplementedError: see `qlinear`.

    Example:
        >>> codes, scale = zo_kernels.quant.absmax(conv.weight)
        >>> y = qconv2d(x, pack(codes), scale, bias=conv.bias, kernel_size=3, padding=1)
    """
    seed, draws, coeffs = _quantized.normalized("qconv2d", seed, draws, coeffs, perturb, headroom)
    call = Call(
        *(x, qweight, scale, zero_point, bias, bits, act_bits, x_scale, in_scale, activation),
        *(residual, perturb, kind, seed, stream, draws, coeffs, headroom, out_dtype),
    )
    pairs = (_pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation))
    geometry = Geometry(*pairs, groups)
    _check(call, geometry)
    y: Tensor = _op(*call[:5], *geometry, *call[5:])
    return y


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value
