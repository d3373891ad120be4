# SPDX-License-Identifier: Apache-2.0
"""What `group_norm` and `group_norm_quantize` share: checks, reference, examples."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_kernels._registry import Example
from zo_kernels.ops._quantized import ACTIVATIONS, FLOATS, check_tensor, names, refusal
from zo_kernels.ops._quantized_backend import supports_quantize_rows

SCHEMA_ARGUMENTS = (
    "(Tensor x, int groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, "
    'Tensor? shift=None, str activation="none")'
)


def check(
    op: str,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor | None,
    activation: str,
) -> None:
    """Raise unless the arguments fit each other; the values of tensors are not read."""
    if x.dtype not in FLOATS:
        raise TypeError(refusal(op, "x", names(FLOATS), x.dtype, "cast it"))
    if x.dim() != 4 or not all(x.shape[1:]):
        got, advice = f"shape {list(x.shape)}", "check which layer it feeds"
        raise ValueError(refusal(op, "x", "[B, C, H, W] with at least one value each", got, advice))
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        requirement = f"positive and divide the {channels} channels of x"
        advice = "copy it from the float layer"
        raise ValueError(refusal(op, "groups", requirement, groups, advice))
    if not eps >= 0:
        raise ValueError(refusal(op, "eps", "at least 0", eps, "copy it from the float layer"))
    if activation not in ACTIVATIONS:
        raise ValueError(
            refusal(op, "activation", f"one of {ACTIVATIONS}", repr(activation), "choose one")
        )
    for name, value, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("shift", shift, (x.shape[0], channels)),
    ):
        if value is not None:
            advice = "check which layer x feeds"
            check_tensor(op, name, value, FLOATS, shape, x.device, advice)


def normalized(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The reference: [B, C, H, W] in fp32, or fp64 where x has it."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(wide)
    if shift is not None:
        x = x + shift.to(wide)[:, :, None, None]
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    y = torch.group_norm(x.contiguous(), groups, weight, bias, eps)
    if activation == "silu":
        return F.silu(y)
    return F.gelu(y) if activation == "gelu" else y


def examples() -> Iterator[Example]:
    for dtype in FLOATS:
        x = torch.linspace(-3, 2, 2 * 12 * 5 * 3).sin().to(dtype).view(2, 12, 5, 3)
        weight, bias = torch.linspace(0.5, 2, 12).to(dtype), torch.linspace(-1, 1, 12).to(dtype)
        shift = torch.linspace(-1, 2, 24).to(dtype).view(2, 12)
        yield x, 3, weight, bias, 1e-5, shift, "silu"
        yield x.to(memory_format=torch.channels_last), 12, weight, None, 1e-6, None, "none"
    x = torch.linspace(-3, 2, 2 * 34 * 9 * 8).view(2, 34, 9, 8)
    yield x, 2, None, torch.linspace(-1, 1, 34), 1e-5, None, "gelu"
    yield x[:, :, ::2], 1, None, None, 0.0, None, "none"
    yield x[:0], 2, None, None, 1e-5, None, "silu"


def supports(backend: str, x: Tensor, *_: object) -> str | None:
    return supports_quantize_rows(backend, x, per_sample=True)
