# SPDX-License-Identifier: Apache-2.0
"""`qlinear`: a linear layer whose weight is stored as integers,
y[m, n] = activation(sum_k x[m, k] * scale[n] * (q[n, k] - zero_point[n]) + bias[n]) + residual,
with 8- or 4-bit codes, one scale for a row or for groups of its inputs, activations rounded to int8
or not, and several seeded perturbations of the weight or of its scales in one pass.

Codes with a scale are those of optimum-quanto (the stack of ZOODiP, arXiv 2503.14868), which makes
a float weight of them at each call; here the scale comes behind the sum. Dynamic int8 activations
with a scale for each row are LLM.int8's (arXiv 2208.07339), perturbed scales QZO's (arXiv
2505.13430).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels._registry import Example, define
from zo_kernels.ops import _quantized
from zo_kernels.ops._quantized import Call, Layer
from zo_kernels.ops._quantized_backend import backends, launch, supports_qlinear
from zo_kernels.ops._quantized_examples import examples
from zo_kernels.ops._quantized_gradient import Adjoint, gradients, setup_context
from zo_kernels.ops._quantized_reference import evaluate, outside_autocast

SCHEMA = (
    "qlinear(Tensor x, Tensor qweight, Tensor scale, Tensor? zero_point=None, Tensor? bias=None, "
    f"{_quantized.SCHEMA_TAIL}) -> Tensor"
)


def _layer(call: Call) -> Layer:
    shape = call.x.shape
    k = shape[-1]
    return Layer("qlinear", call.scale.shape[0], 1, k, shape[:-1], k, per_sample=False)


def _check(call: Call) -> None:
    shape = call.x.shape
    _quantized.check_operands("qlinear", call, len(shape) > 0 and shape[-1] > 0, "[..., K]")
    _quantized.check(call, _layer(call))


def _products(a: Tensor, weight: Tensor, groups: int) -> Iterator[Tensor]:
    size = weight.shape[1] // groups
    for k in range(0, weight.shape[1], size):
        yield a[..., k : k + size] @ weight[:, k : k + size].T


@outside_autocast
def qlinear_ref(*args: Any) -> Tensor:
    call = Call(*args)
    return evaluate(call, _layer(call), _products)


def _triton(*args: Any) -> Tensor:
    y: Tensor = launch("qlinear", Call(*args))
    return y


def _fake(*args: Any) -> Tensor:
    call = Call(*args)
    _check(call)
    layer = _layer(call)
    return call.x.new_empty((*layer.lead, layer.n), dtype=call.result_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    call = Call(*inputs)
    setup_context(ctx, call, _layer(call))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    def weight(a: Tensor, d: Tensor) -> Tensor:
        return d.reshape(-1, d.shape[-1]).T @ a.reshape(-1, a.shape[-1])

    def inputs(weight: Tensor, d: Tensor) -> Tensor:
        return d @ weight

    found = gradients(ctx, grad, lambda groups: Adjoint(weight, inputs), lambda call: _op(*call))
    return tuple(found.get(name) for name in Call._fields)


def _examples() -> Iterator[Example]:
    for weight, dtype, noise in examples((7, 63), (1, 3, 1, 9)):
        x = torch.linspace(-1, 1, 4 * 63).to(dtype).view(4, 63)
        for act_bits in (16, 8):
            plain = Call(x, **weight, act_bits=act_bits)
            yield plain._replace(bias=torch.linspace(-1, 1, 7).to(dtype))
            yield plain._replace(x=x.view(4, 1, 63), **noise)
        codes = x.mul(127).to(torch.int8)
        yield plain._replace(x=codes, x_scale=torch.linspace(0, 1, 4))
    more: dict[str, Any] = {"in_scale": torch.linspace(0.5, 2, 63), "activation": "gelu"}
    more |= {"residual": torch.ones(4, 7).half(), "out_dtype": torch.bfloat16}
    yield plain._replace(**more)
    plain = plain._replace(x=torch.ones(63, 4).t(), act_bits=16)
    yield plain
    yield plain._replace(x=torch.ones(63))
    yield plain._replace(x=torch.ones(0, 63), act_bits=8)
    trained = torch.ones(5, 63, requires_grad=True)
    yield plain._replace(x=trained, bias=torch.ones(7, requires_grad=True))
    more = {"residual": torch.ones(5, 7, requires_grad=True), "in_scale": torch.ones(63)}
    yield plain._replace(x=trained, act_bits=8, activation="silu", **more)
    scales = {"scale": plain.scale.clone(), "in_scale": torch.ones(63)}
    trained_scales: dict[str, Any] = {k: s.requires_grad_() for k, s in scales.items()}
    yield plain._replace(x=trained.detach(), act_bits=8, activation="gelu", **trained_scales)
    yield plain._replace(x=trained, **trained_scales)


_op = define(
    SCHEMA,
    reference=qlinear_ref,
    fake=_fake,
    device_of=lambda x, *_: x.device,
    examples=_examples,
    backends=backends("qlinear", supports_qlinear, _triton),
    backward=_backward,
    setup_context=_setup_context,
)


def qlinear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
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
    """A linear layer whose weight w = scale * (q - zero_point) is stored as integers q:
    y = activation(x @ w.T + bias) + residual.

    With `act_bits=8` x is rounded by `quantize_rows`, integers are multiplied and summed exactly,
    and the result is the same to the bit on every backend, but for an activation. With
    `act_bits=16` x keeps its dtype (the reference multiplies float16 in fp32, where unscaled sums
    cannot overflow), also under autocast. Codes are converted for the length of the call; nothing
    is kept. Gradients flow to x, scale, in_scale, bias and residual, without a floating weight; the
    codes are frozen. Rounding of x passes them straight through.

    P = len(draws) perturbations are evaluated in one pass: sample b of the first axis of x, of
    size B, sees perturbation p = b * P // B, of coefficient c = coeffs[p] and noise z or R, drawn
    by `zo_kernels.rng` from (seed, draws[p], stream). What `perturb` may be:

    - "scale": scale + c * z, z for each element of scale, row-major.
    - "scale_relative": scale * (1 + c * z).
    - "weight": w + scale * c * R, with a sign R for each weight, element n * K + k; any c.
    - "codes": the same with whole c, in steps of a code (8 bits) or of 1/16 code (4 bits), which
      a kernel adds to the codes themselves; `headroom` is the largest |c|.

    Args:
        x: fp32, bf16, fp16 or fp64 [..., K], any strides; or int8 codes with `x_scale`.
        qweight: uint8, the codes q [N, K] as `zo_kernels.packing.pack` lays them out.
        scale: fp32 [N], the weight's units per code; or [N, G] for G groups of K / G inputs.
            Values are not read: where one is not finite, so is the result.
        zero_point: int8 in the shape of scale, the code of weight 0; None is 0.
        bias: floating [N]; None is 0.
        bits: of a code, 8 or 4.
        act_bits: 16 leaves floating x as it is, 8 rounds it to int8.
        x_scale: fp32 [...], one for each row of int8 x.
        in_scale: fp32 [K], multiplied to floating x first.
        activation: "none", "silu" or "gelu" (by erf).
        residual: floating, in the shape of the result.
        perturb: "none", or what is perturbed; see above.
        kind: of z, "normal" or "rademacher"; R is always of the latter.
        seed, draws: 64-bit numbers, signed or unsigned; stream: of this weight, in [0, 2^32).
        coeffs: one for each draw. A float32 tensor on the CPU keeps `torch.compile` from compiling
            anew for each value.
        headroom: of "codes": every code is in -127 + headroom to 127 - headroom (8 bits), or in -7
            to 7 (4 bits, where headroom is at most 15). Not tested.
        out_dtype: of the result; None is that of floating x, else fp32.

    Returns:
        [..., N], contiguous. Rows of x that hold NaN or infinity come out as such.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes do not fit each other, a number or a name is out of range, the tensors
            are on several devices, or K exceeds 65536 where integers are summed.
        NotImplementedError: x_scale requires a gradient, or anything does where `perturb` is set.

    Example:
        >>> codes, scale = zo_kernels.quant.absmax(linear.weight)
        >>> y = qlinear(x, pack(codes), scale, bias=linear.bias, act_bits=8)
    """
    seed, draws, coeffs = _quantized.normalized("qlinear", seed, draws, coeffs, perturb, headroom)
    call = Call(
        *(x, qweight, scale, zero_point, bias, bits, act_bits, x_scale, in_scale, activation),
        *(residual, perturb, kind, seed, stream, draws, coeffs, headroom, out_dtype),
    )
    _check(call)
    y: Tensor = _op(*call)
    return y
