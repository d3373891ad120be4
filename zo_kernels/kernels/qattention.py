# SPDX-License-Identifier: Apache-2.0
"""`qattention` in Triton: softmax(scale * q k^T) v, blocks of keys passing by a tile of queries
(FlashAttention, arXiv 2205.14135).

query is fp32, bf16 or fp16 [B, M, heads * D], D at most 256; keys and values are fp16 with units of
their own (`zo_kernels.kernels._attention`), queries become so in registers, with a unit for each.
Products run on tensor cores of 16 bits and are summed in fp32; weights are fp16 up to 2^14.

These are not the integers of the CPU, whose 16 bits a tensor core does not multiply, and not its
bits: queries, keys and weights have 11 bits of themselves where it has 12 to 15 of the largest;
values have 11 where it has 10. The op's error bound holds, and so do its units: no sample reads
another one. D is two powers of two (40 = 32 + 16): one alone would be up to 64. Traffic: queries
once; keys and values once for each tile, from L2; no scores. Not yet confirmed on a GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._attention import halves, halves_of, unit_of
from zo_kernels.kernels._codes import magnitude
from zo_kernels.kernels._tuning import bucket, tuned

# What tuning may try; n divides `_attention.KEYS`.
OPTIONS = {"n": (16, 32, 64, 128), "m": (16, 32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3, 4)}

_LOG2_E = tl.constexpr(1.4426950408889634)
_TOP = tl.constexpr(14.0)  # log2 of the largest weight: small ones stay above fp16's subnormals
_NO_SCORE = tl.constexpr(-3e38)


class Tiles(NamedTuple):
    """`m` queries of a program, `n` keys at a time; warps of a program; blocks on their way."""

    m: int
    n: int
    warps: int
    stages: int


def tiles(queries: int, depth: int) -> Tiles:
    """What works untuned: as much as fits into registers on every GPU that tests compile for."""
    m = min(128 if depth <= 128 else 64, max(16, triton.next_power_of_2(queries)))
    warps = 8 if m > 64 or m * depth > 64 * 96 else 4
    return Tiles(m, 64 if depth <= 96 else 32, warps, stages=3 if depth <= 128 else 2)


def padded_depth(depth: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, whose sum is at least `depth`; each at least 16."""
    high = max(16, 1 << (depth.bit_length() - 1))
    if depth <= high:
        return high, 0
    low = max(16, triton.next_power_of_2(depth - high))
    return (high, low) if low < high else (2 * high, 0)


@triton.jit
def _queries(query_ptr, row, there, d, depth, scale):
    """fp32; keys are multiplied by |scale| later."""
    at = row.to(tl.int64)[:, None] + d[None, :]
    q = tl.load(query_ptr + at, there[:, None] & (d < depth)[None, :], other=0.0).to(tl.float32)
    return tl.where(scale < 0, -q, q)


@triton.jit
def _store(out_ptr, at, there, acc, total, largest_ptr, d, depth):
    here = d < depth
    unit = unit_of(tl.load(largest_ptr + d, here, other=0))
    y = acc / total[:, None] * unit[None, :]
    at = at[:, None] + d[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), there[:, None] & here[None, :])


@triton.jit
def _qattention_kernel(
    query_ptr,  # [B, queries, heads * depth]
    keys_ptr, values_ptr,  # [B, heads, padded, HIGH + LOW]
    largest_keys_ptr, largest_values_ptr,  # [B, heads * depth]
    out_ptr,  # [B, queries, heads * depth]
    queries, keys, padded, heads, depth,
    sample_stride: tl.int64, row_stride: tl.int64,  # of queries
    scale,
    HIGH: tl.constexpr, LOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    DEPTH: tl.constexpr = HIGH + LOW
    tiles_of_queries = tl.cdiv(queries, BLOCK_M)
    head = tl.program_id(0) // tiles_of_queries % heads
    sample = (tl.program_id(0) // tiles_of_queries // heads).to(tl.int64)
    m_ = tl.program_id(0) % tiles_of_queries * BLOCK_M + tl.arange(0, BLOCK_M)
    m_there = m_ < queries
    n_ = tl.arange(0, BLOCK_N)
    d_high, d_low = tl.arange(0, HIGH), HIGH + tl.arange(0, LOW or 1)
    channel = (sample * heads + head) * depth  # of the tables of units
    largest_keys_ptr += channel
    largest_values_ptr += channel
    first_key = (sample * heads + head) * padded * DEPTH
    keys_ptr += first_key
    values_ptr += first_key

    query_ptr += sample * sample_stride + head * depth
    q_row = m_.to(tl.int64) * row_stride
    q = _queries(query_ptr, q_row, m_there, d_high, depth, scale)  # [BLOCK_M, HIGH]
    q_most = tl.max(magnitude(q), 1)
    k_most = tl.max(tl.load(largest_keys_ptr + d_high, d_high < depth, other=0), 0)
    if LOW:
        q_low = _queries(query_ptr, q_row, m_there, d_low, depth, scale)
        q_most = tl.maximum(q_most, tl.max(magnitude(q_low), 1))
        low = tl.load(largest_keys_ptr + d_low, d_low < depth, other=0)
        k_most = tl.maximum(k_most, tl.max(low, 0))
        q_low = halves_of(q_low, q_most[:, None])
        acc_low = tl.zeros((BLOCK_M, LOW), tl.float32)
    q = halves_of(q, q_most[:, None])
    factor = unit_of(q_most) * unit_of(k_most) * (tl.abs(scale) * _LOG2_E)  # not negative

    acc = tl.zeros((BLOCK_M, HIGH), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    for LAST in tl.static_range(2):  # whole blocks, then one that is not, if there is
        for start in range(whole if LAST else 0, keys if LAST else whole, BLOCK_N):
            at = (start + n_).to(tl.int64)[:, None] * DEPTH
            scores = tl.dot(q, tl.trans(tl.load(keys_ptr + at + d_high[None, :])))
            if LOW:
                k_low = tl.load(keys_ptr + at + d_low[None, :])
                scores = tl.dot(q_low, tl.trans(k_low), scores)
            if LAST:
                scores = tl.where((start + n_ < keys)[None, :], scores, _NO_SCORE)
            higher = tl.maximum(most, tl.max(scores, 1) * factor)
            weights = tl.exp2(scores * factor[:, None] - (higher - _TOP)[:, None])
            if LAST:  # scores that are zeros have a factor of 0
                weights = tl.where((start + n_ < keys)[None, :], weights, 0.0)
            shrink = tl.exp2(most - higher)
            most = higher
            total = total * shrink + tl.sum(weights, 1)
            weights = weights.to(tl.float16)
            v = tl.load(values_ptr + at + d_high[None, :])
            acc = tl.dot(weights, v, acc * shrink[:, None])
            if LOW:
                v_low = tl.load(values_ptr + at + d_low[None, :])
                acc_low = tl.dot(weights, v_low, acc_low * shrink[:, None])

    out_at = ((sample * queries + m_) * heads + head) * depth
    _store(out_ptr, out_at, m_there, acc, total, largest_values_ptr, d_high, depth)
    if LOW:
        _store(out_ptr, out_at, m_there, acc_low, total, largest_values_ptr, d_low, depth)


def qattention_triton(
    query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float
) -> Tensor:  # fmt: skip
    """The arguments are those of the op, checked. What has strided channels is copied."""
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    batch, queries, width = query.shape
    out = query.new_empty(query.shape)
    if not out.numel():
        return out
    depth, keys = width // heads, key.shape[1]
    high, low = padded_depth(depth)
    with torch.cuda.device_of(query):
        codes, largest = halves(key, value, heads, high + low)

        def run(cut: Tiles) -> None:
            _qattention_kernel[(batch * heads * triton.cdiv(queries, cut.m),)](
                *(query, *codes, *largest, out, queries, keys, codes.shape[3], heads, depth),
                *(*query.stride()[:2], scale),
                HIGH=high,
                LOW=low,
                BLOCK_M=cut.m,
                BLOCK_N=cut.n,
                num_warps=cut.warps,
                num_stages=cut.stages,
            )

        formats: dict[str, object] = {"queries": bucket(queries), "keys": bucket(keys)}
        formats |= {"depth": depth, "heads": batch * heads, "dtype": query.dtype}
        cut = tiles(queries, high + low)
        run(tuned("qattention", formats, cut, lambda: OPTIONS, run, query.device))
    return out
