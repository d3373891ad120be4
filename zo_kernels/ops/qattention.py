# SPDX-License-Identifier: Apache-2.0
"""`qattention`: softmax(scale * q k^T) v of several heads, in fixed point.

Queries and keys become integers of about 13 bits, softmax weights of 14 and values of 10, so that
every product is one of 16-bit integers, summed exactly: twice the rate of fp32, with far less
rounding than int8 (SageAttention, arXiv 2410.02367, keeps weights and values in fp16). Scores and
weights never exist as a matrix, as in FlashAttention (arXiv 2205.14135).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from zo_kernels._registry import Example, define
from zo_kernels.ops._quantized import FLOATS, check_tensor, names, refusal
from zo_kernels.ops._quantized_backend import backends, supports_rows
from zo_kernels.ops.quantize_rows import SMALLEST

SCHEMA = "qattention(Tensor query, Tensor key, Tensor value, int heads, float scale) -> Tensor"
WEIGHT_CODE = 16383  # of a weight of 1
VALUE_CODE = 1023  # of a channel's largest value
DEEPEST = 256  # channels of a head that the registers of a GPU hold


def largest_code(depth: int) -> int:
    """Of the largest query and key: sums of `depth` products stay below 2^30."""
    return min(32767, math.isqrt((2**30 - 1) // depth))


def _check(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> None:
    op = "qattention"
    if query.dtype not in FLOATS:
        raise TypeError(refusal(op, "query", names(FLOATS), query.dtype, "cast it"))
    if query.dim() != 3:
        got, advice = f"shape {list(query.shape)}", "flatten the heads into the last dimension"
        raise ValueError(refusal(op, "query", "[B, M, heads * D]", got, advice))
    batch, _, width = query.shape
    if heads < 1 or width < 1 or width % heads:
        requirement = f"positive and divide the {width} channels of query"
        raise ValueError(refusal(op, "heads", requirement, heads, "copy it from the layer"))
    if key.dim() != 3 or key.shape[1] < 1:
        got, advice = f"shape {list(key.shape)}", "attend to at least one key"
        raise ValueError(refusal(op, "key", "[B, L, heads * D] with L >= 1", got, advice))
    shape = (batch, key.shape[1], width)
    for name, tensor in (("key", key), ("value", value)):
        advice = "project both from the same tokens"
        check_tensor(op, name, tensor, (query.dtype,), shape, query.device, advice)
    if not math.isfinite(scale):
        raise ValueError(refusal(op, "scale", "finite", scale, "1 / sqrt(D) is usual"))


def _codes(x: Tensor, dims: int | tuple[int, ...], code: int) -> tuple[Tensor, Tensor]:
    """Whole numbers up to `code`, as fp64, and their unit, which is NaN where x is not finite."""
    most = x.abs().amax(dims, keepdim=True)
    usable = (most >= SMALLEST) & most.isfinite()
    by = torch.where(usable, code / most, 0.0)
    codes = torch.nan_to_num(x * by, nan=0.0).round()
    unit = torch.where(usable, most / code, torch.where(most.isfinite(), 0.0, math.nan))
    return codes.double(), unit


def qattention_ref(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    split = (t.to(wide).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    q, k, v = split  # [B, heads, rows, D]
    code = largest_code(q.shape[-1])
    q, q_unit = _codes(q, -1, code)
    k, k_unit = _codes(k, (-2, -1), code)
    v, v_unit = _codes(v, -2, VALUE_CODE)
    scores = q @ k.transpose(-1, -2)
    scores -= scores.amax(-1, keepdim=True)
    weights = (scores * (q_unit * k_unit * scale)).exp_().mul_(WEIGHT_CODE).round_()
    out = (weights @ v) * v_unit / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2).flatten(2).to(query.dtype).contiguous()


def _supports(
    backend: str, query: Tensor, key: Tensor, value: Tensor, heads: int, _: float
) -> str | None:
    if backend == "triton" and query.shape[-1] // heads > DEEPEST:
        return f"only for heads of at most {DEEPEST} channels"
    return supports_rows(backend, query) or supports_rows(backend, key)


def _fake(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    _check(query, key, value, heads, scale)
    return query.new_empty(query.shape)


def _examples() -> Iterator[Example]:
    for dtype in FLOATS:
        tokens = torch.linspace(-3, 2, 2 * 9 * 12).sin().to(dtype).view(2, 9, 12)
        yield tokens, tokens[:, :5].cos(), tokens[:, 1:6], 3, 0.5
    yield tokens[:0], tokens[:0], tokens[:0], 1, 0.3
    yield tokens[:, ::2], tokens, tokens, 12, 1.0


_op = define(
    SCHEMA,
    reference=qattention_ref,
    fake=_fake,
    device_of=lambda query, *_: query.device,
    examples=_examples,
    backends=backends("qattention", _supports),
)


def qattention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, *, scale: float | None = None
) -> Tensor:
    """Multi-head attention softmax(scale * q k^T) v over all keys, in fixed point.

    Each query has a unit of its own, the keys of a head share one, and so does each channel of its
    values; weights are rounded to 1/16383 of the largest one of their query. No sample reads
    another one. No gradient flows.

    On a GPU the same units hold numbers of 11 bits, which its tensor cores multiply (fp16, summed
    in fp32): at most the same error, but not the same bits. Not yet confirmed on a GPU.

    Args:
        query: fp32, bf16, fp16 or fp64 [B, M, heads * D], as a linear layer gives it.
        key, value: [B, L, heads * D] of the same dtype, L >= 1.
        heads: in how many parts the channels fall.
        scale: of the scores; None is 1 / sqrt(D).

    Returns:
        [B, M, heads * D] in the dtype of query. A row whose query or keys hold NaN or infinity is
        NaN, and so is a channel whose values do.

    Raises:
        TypeError: a dtype is not supported, or differs from that of query.
        ValueError: shapes do not fit each other, or `scale` is not finite.

    Example:
        >>> y = qattention(to_q(x), to_k(x), to_v(x), heads=8)
    """
    if scale is None:
        scale = (query.shape[-1] / heads) ** -0.5 if heads > 0 and query.dim() else 1.0
    _check(query, key, value, heads, scale)
    out: Tensor = _op(query, key, value, heads, scale)
    return out
