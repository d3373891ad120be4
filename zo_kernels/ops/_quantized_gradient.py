# SPDX-License-Identifier: Apache-2.0
"""The gradient of `qlinear` and `qconv2d`: of x, bias and residual; the weight is frozen.

Through the dequantized weight, which lives for the call. Rounding of activations passes the
gradient straight through (Bengio et al. 2013, arXiv 1308.3432).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zo_kernels.ops._quantized import Call, Layer
from zo_kernels.ops._quantized_reference import Products, along_inputs, codes, evaluate

_DERIVATIVE = {
    "silu": torch.ops.aten.silu_backward.default,
    "gelu": torch.ops.aten.gelu_backward.default,
}


def setup_context(ctx: Any, call: Call, layer: Layer) -> None:
    """Keep what `gradients` needs; x only where an activation has to be derived.

    Raises:
        NotImplementedError: something is perturbed, or a scale requires a gradient.
    """
    scales = {"scale": call.scale, "in_scale": call.in_scale, "x_scale": call.x_scale}
    for name, tensor in scales.items():
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                f"{layer.op}: {name} must not require a gradient, got one that does; "
                "detach it, or estimate its gradient by forward passes"
            )
    if call.perturb != "none":
        raise NotImplementedError(
            f"{layer.op}: perturb must be 'none' where a gradient is needed, got "
            f"{call.perturb!r}; evaluate perturbations under torch.no_grad()"
        )
    summands = {"bias": call.bias, "residual": call.residual}
    given = {name: tensor for name, tensor in summands.items() if tensor is not None}
    ctx.wanted = {name: tensor.dtype for name, tensor in given.items() if tensor.requires_grad}
    call = call._replace(residual=None)
    if call.activation == "none":
        call = call._replace(x=call.x.new_empty(0))  # for its dtype
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in call))
    ctx.rest = [None if isinstance(value, Tensor) else value for value in call]
    ctx.layer = layer


def gradients(
    ctx: Any,
    grad: Tensor,
    products: Products,
    input_gradient: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, bias and residual.

    Args:
        grad: of the output, [*lead, N].
        input_gradient: a weight [N, K] and the gradient of its product to that of its input.
    """
    kept = zip(ctx.saved_tensors, ctx.rest, strict=True)
    call = Call(*(rest if tensor is None else tensor for tensor, rest in kept))
    layer: Layer = ctx.layer
    found = {name: grad.to(dtype) for name, dtype in ctx.wanted.items()}
    inner = grad.to(call.wide)
    if call.activation != "none":
        plain = call._replace(activation="none", out_dtype=call.wide)
        inner = _DERIVATIVE[call.activation](inner, evaluate(plain, layer, products))
    if "bias" in found:
        found["bias"] = inner.flatten(0, -2).sum(0).to(ctx.wanted["bias"])
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight = codes(call, layer, call.wide).view(layer.n, call.scale_groups, -1)
        weight = weight.mul_(call.scale.view(layer.n, -1, 1)).view(layer.n, layer.k)
        dtype = torch.bfloat16 if call.x.dtype == torch.bfloat16 else call.wide
        grad_x = input_gradient(weight.to(dtype), inner.to(dtype))
        if call.in_scale is not None:
            grad_x = grad_x * along_inputs(call.in_scale, layer)
        grad_x = grad_x.to(call.x.dtype)
    return grad_x, found.get("bias"), found.get("residual")
