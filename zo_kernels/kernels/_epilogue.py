# SPDX-License-Identifier: Apache-2.0
"""From sums to outputs: the steps of `zo_kernels.ops._quantized_reference`, each rounded once.

Tiles lie as [n, m]: the weight is the first operand of a product, so that a Hopper tensor core
takes it from registers, where it was unpacked.
"""

import triton
import triton.language as tl

from zo_kernels.kernels._noise import noise_at

_SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def scale_at(
    scale_ptr, at, there, coeff, draw, stream, seed,
    PERTURB: tl.constexpr, NORMAL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Scales number `at`, int64, of this perturbation, for sums in which a code counts UNIT."""
    scale = tl.load(scale_ptr + at, there, other=0.0)
    if PERTURB == "scale":
        scale = scale + coeff * noise_at(at, stream, draw, seed, NORMAL)
    elif PERTURB == "scale_relative":
        scale = scale * (1.0 + coeff * noise_at(at, stream, draw, seed, NORMAL))
    return scale * (1.0 / UNIT)


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "gelu":
        y = y * 0.5 * (1.0 + tl.erf(y * _SQRT_HALF))
    return y


@triton.jit
def finish(
    y,  # fp32 [n, m], scaled
    n_, m_,  # which rows of the weight (int64) and of the output they are, [n] and [m]
    n_there, m_there,
    a_scale_ptr,  # [M / rows_of_a_scale]
    bias_ptr,  # [n]
    residual_ptr, y_ptr,  # [M, n]
    n, rows_of_a_scale,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    if a_scale_ptr is not None:
        y = y * tl.load(a_scale_ptr + m_ // rows_of_a_scale, m_there, other=0.0)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n_, n_there, other=0.0).to(tl.float32)[:, None]
    y = activated(y, ACTIVATION)
    at = m_.to(tl.int64)[None, :] * n + n_[:, None]
    there = m_there[None, :] & n_there[:, None]
    if residual_ptr is not None:
        y = y + tl.load(residual_ptr + at, there, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), there)


@triton.jit
def moved_sums(acc, signed, coeff, PERTURB: tl.constexpr):
    """fp32: sums over the codes, moved by coeff times sums over the signs."""
    total = acc.to(tl.float32)
    if PERTURB == "weight":
        total = total + coeff * signed.to(tl.float32)
    return total


@triton.jit(do_not_specialize=["seed", "stream", "rows", "m"])
def _join_kernel(
    part_ptr,  # [SPLITS, M, n], int32 or fp32
    scale_ptr,  # [n], None where the parts are scaled
    a_scale_ptr, bias_ptr, residual_ptr, y_ptr,  # see `finish`
    draws_ptr, coeffs_ptr,  # [P]
    m, n, rows_of_a_scale,
    rows,  # of a perturbation
    seed: tl.int64, stream: tl.int64,
    PERTURB: tl.constexpr, NORMAL: tl.constexpr, UNIT: tl.constexpr, ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of a product whose k was split among programs; a program joins BLOCK_N of one row."""
    blocks = tl.cdiv(n, BLOCK_N)
    row = tl.program_id(0) // blocks
    n_ = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    n_there = n_ < n
    at = row.to(tl.int64) * n + n_
    total = tl.load(part_ptr + at, n_there, other=0)
    for i in tl.static_range(1, SPLITS):
        total += tl.load(part_ptr + (i * m).to(tl.int64) * n + at, n_there, other=0)
    y = total.to(tl.float32)
    if scale_ptr is not None:
        coeff, draw = tl.full((), 0.0, tl.float32), seed
        if PERTURB != "none":
            coeff, draw = tl.load(coeffs_ptr + row // rows), tl.load(draws_ptr + row // rows)
        y = y * scale_at(
            scale_ptr, n_, n_there, coeff, draw, stream, seed, PERTURB, NORMAL, UNIT
        )  # fmt: skip
    m_ = row + tl.arange(0, 1)
    finish(
        y[:, None], n_, m_, n_there, m_ < m, a_scale_ptr, bias_ptr, residual_ptr, y_ptr, n,
        rows_of_a_scale, ACTIVATION,
    )  # fmt: skip
