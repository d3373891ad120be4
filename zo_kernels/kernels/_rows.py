# SPDX-License-Identifier: Apache-2.0
"""Rows to int8 in Triton: what `quantize_rows`, `layer_norm_quantize` and `geglu_quantize` share.

    y = ((x - mean(x)) * rate(x)) * by + after, of x = value * gelu(gate) where it is GATED,

each part where the op has it; then y becomes codes. x is fp32, bf16 or fp16 [M, K], or [M, 2 K]
where values and gates lie side by side; codes are int8 [M, K], scale fp32 [M], by and after [K].
Traffic: one read of x and one write of codes. A row of more than LONGEST values does not stay in
registers: it is read twice, or four times where it is normalized, from L2 but for the first time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._codes import codes_of, magnitude, scale_of
from zo_kernels.kernels._epilogue import activated

LONGEST = 8192  # values that a program keeps in registers
WARPS = 8


@triton.jit
def _load(x_ptr, start, column, k, mask, GATED: tl.constexpr):
    """fp32 values of x, zeros where the mask is false."""
    x = tl.load(x_ptr + start + column, mask, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(x_ptr + start + k + column, mask, other=0.0).to(tl.float32)
        x = x * activated(gate, "gelu")
    return x


@triton.jit
def _rate(squares, k, eps):
    """1 / standard deviation, of a sum of squares around the mean."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, k * 1.0) + eps))


@triton.jit
def _value(x, mean, rate, by_ptr, after_ptr, column, mask, NORMALIZED: tl.constexpr):
    if NORMALIZED:
        x = (x - mean) * rate
    if by_ptr is not None:
        x = x * tl.load(by_ptr + column, mask, other=0.0).to(tl.float32)
    if after_ptr is not None:
        x = x + tl.load(after_ptr + column, mask, other=0.0).to(tl.float32)
    return tl.where(mask, x, 0.0)


@triton.jit(do_not_specialize=["rows"])
def _rows_kernel(
    x_ptr,  # [rows, stride]
    by_ptr, after_ptr,  # [k]
    codes_ptr,  # [rows, k]
    scale_ptr,  # [rows]
    rows: tl.int64,
    k: tl.int64,
    stride: tl.int64,
    eps,
    GATED: tl.constexpr, NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    there, start = row < rows, row * stride
    mean, rate = tl.zeros((ROWS, 1), tl.float32), tl.zeros((ROWS, 1), tl.float32)
    if WHOLE:
        mask = there & (column < k)
        x = _load(x_ptr, start, column, k, mask, GATED)
        if NORMALIZED:
            mean = tl.div_rn(tl.sum(x, 1)[:, None], k * 1.0)
            d = tl.where(mask, x - mean, 0.0)
            rate = _rate(tl.sum(d * d, 1)[:, None], k, eps)
        y = _value(x, mean, rate, by_ptr, after_ptr, column, mask, NORMALIZED)
        largest = tl.max(magnitude(y), 1)[:, None]
        tl.store(codes_ptr + row * k + column, codes_of(y, largest), mask)
    else:
        if NORMALIZED:
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            for first in range(0, k, BLOCK):
                at = first + column
                total += _load(x_ptr, start, at, k, there & (at < k), GATED)
            mean = tl.div_rn(tl.sum(total, 1)[:, None], k * 1.0)
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            for first in range(0, k, BLOCK):
                at = first + column
                mask = there & (at < k)
                d = tl.where(mask, _load(x_ptr, start, at, k, mask, GATED) - mean, 0.0)
                total += d * d
            rate = _rate(tl.sum(total, 1)[:, None], k, eps)
        most = tl.zeros((ROWS, BLOCK), tl.int32)
        for first in range(0, k, BLOCK):
            at = first + column
            mask = there & (at < k)
            x = _load(x_ptr, start, at, k, mask, GATED)
            y = _value(x, mean, rate, by_ptr, after_ptr, at, mask, NORMALIZED)
            most = tl.maximum(most, magnitude(y))
        largest = tl.max(most, 1)[:, None]
        for first in range(0, k, BLOCK):
            at = first + column
            mask = there & (at < k)
            x = _load(x_ptr, start, at, k, mask, GATED)
            y = _value(x, mean, rate, by_ptr, after_ptr, at, mask, NORMALIZED)
            tl.store(codes_ptr + row * k + at, codes_of(y, largest), mask)
    tl.store(scale_ptr + row, scale_of(largest), there)


def rows_to_codes(
    x: Tensor,
    by: Tensor | None = None,
    after: Tensor | None = None,
    *,
    gated: bool = False,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """int8 [..., K] and fp32 [...] of x [..., K], or [..., 2 K] if it is gated; normalized where
    there is an eps. x is copied where its rows are strided."""
    lead, width = x.shape[:-1], x.shape[-1]
    k = width // 2 if gated else width
    flat = x.reshape(-1, width)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    codes = x.new_empty((*lead, k), dtype=torch.int8)
    scale = x.new_empty(lead, dtype=torch.float32)
    by, after = (t if t is None else t.contiguous() for t in (by, after))
    block = min(triton.next_power_of_2(k), LONGEST)
    together = max(1, 1024 // block)
    if len(flat):
        with torch.cuda.device_of(x):
            _rows_kernel[(triton.cdiv(len(flat), together),)](
                *(flat, by, after, codes, scale, len(flat), k, flat.stride(0), eps or 0.0),
                GATED=gated,
                NORMALIZED=eps is not None,
                ROWS=together,
                BLOCK=block,
                WHOLE=k <= block,
                num_warps=WARPS if block * together > 1024 else 4,
                enable_fp_fusion=False,
            )
    return codes, scale
