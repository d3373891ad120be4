# SPDX-License-Identifier: Apache-2.0
"""Launches of a product: what the kernels of `qlinear` and `qconv2d` share on the host.

`call` is an `ops._quantized.Call`, checked; its module imports this one, not the other way round.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.kernels._epilogue import _join_kernel
from zo_kernels.kernels._numbers import on_device
from zo_kernels.kernels._product import _product_kernel
from zo_kernels.kernels._tiles import Tiles, options, tiles
from zo_kernels.kernels._tuning import bucket, tuned
from zo_kernels.kernels.quantize_rows import quantize_rows_triton

_JOINED = 256  # columns of a program that joins parts


class Picture(NamedTuple):
    """What a convolution reads and writes; pairs are (vertical, horizontal)."""

    size: tuple[int, int] = (1, 1)
    out_size: tuple[int, int] = (1, 1)
    kernel_width: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def numbers(self) -> tuple[int, ...]:
        """In the order of the kernel's parameters."""
        return (
            *(*self.size, *self.out_size, self.kernel_width),
            *(*self.stride, *self.padding, *self.dilation),
        )


def activations(call: Any, per_sample: bool) -> tuple[Tensor, Tensor | None]:
    """What is multiplied, and its scale where it is integers."""
    if call.x.dtype == torch.int8 or call.act_bits != 8:
        return call.x, call.x_scale
    return quantize_rows_triton(call.x, per_sample, call.in_scale)


def operand(call: Any) -> tuple[Any, int]:
    """The dtype that floating a is multiplied in, and how many numbers of it make one of a."""
    dtype = call.x.dtype
    if dtype == torch.bfloat16 and (call.in_scale is None or call.result_dtype == dtype):
        return tl.bfloat16, 1
    if dtype == torch.float16 and call.in_scale is None:
        return tl.float16, 1
    return tl.bfloat16, 3


def aligned(channels: int) -> int:
    """128, 32 or 1: it divides the number of the first element of each tap of each row."""
    return next(size for size in (128, 32, 1) if channels % size == 0)


def multiply(
    call: Any,
    a: Tensor,
    a_scale: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    taps: int,
    channels: int,
    rows_of_a_scale: int,
    picture: Picture | None = None,
) -> None:
    """y [M, N] <- what `call` says, of a [M, channels] or, for a convolution, [B, H, W, channels].

    `residual` is [M, N]; a row of a is contiguous, everything else whole.
    """
    if not y.numel():
        return
    m, n = y.shape
    count = max(1, len(call.draws))
    groups, integer = call.scale_groups, call.is_integer
    grouped = groups > 1
    # Sums of integers in fp32 would depend on how they were split.
    splittable = not integer or not (grouped or call.perturb == "weight")
    dtype, parts = (tl.int8, 1) if integer else operand(call)
    heavy = parts > 1 or call.perturb == "weight"
    shape = (m // count, n, taps, channels, groups)
    cut = tiles(*shape, integer=integer, heavy=heavy, splittable=splittable)
    draws, coeffs = None, None
    if call.perturb != "none":
        draws, coeffs = on_device(call.draws, call.coeffs, y.device)
    sixteenths = call.bits == 4 and not (integer and call.zero_point is not None)
    noise = {"PERTURB": call.perturb, "NORMAL": call.kind == "normal"}
    noise["UNIT"] = 16 if sixteenths else 1
    weight = (_words(call.qweight), call.scale.contiguous(), _whole(call.zero_point))
    in_scale = None if integer else _whole(call.in_scale)
    outputs = [_whole(t) for t in (a_scale, call.bias, residual, y)]

    def run(cut: Tiles) -> None:
        part = None
        if cut.splits > 1:
            part = y.new_empty((cut.splits, m, n), dtype=torch.int32 if integer else torch.float32)
        grid = (count * triton.cdiv(m // count, cut.m) * triton.cdiv(n, cut.n) * cut.splits,)
        _product_kernel[grid](
            *(a, *weight, in_scale, *outputs, part, draws, coeffs, m // count),
            *(n, channels, taps, groups, rows_of_a_scale, call.seed, call.stream, a.stride(0)),
            *(picture or Picture()).numbers(),
            **noise,
            BITS=call.bits,
            INTEGER=integer,
            CONV=picture is not None,
            BLOCKS=taps * channels // groups // cut.k if grouped else 0,
            ALIGNED=aligned(channels),
            ACTIVATION=call.activation,
            DTYPE=dtype,
            PARTS=parts,
            PERTURBATIONS=count,
            SPLITS=cut.splits,
            **_blocks(cut),
            num_warps=cut.warps,
            num_stages=cut.stages,
            enable_fp_fusion=False,
        )
        if part is not None:
            _join_kernel[(m * triton.cdiv(n, _JOINED),)](
                *(part, None if grouped else weight[1], *outputs, draws, coeffs),
                *(m, n, rows_of_a_scale, m // count, call.seed, call.stream),
                **noise,
                ACTIVATION=call.activation,
                SPLITS=cut.splits,
                BLOCK_N=_JOINED,
                num_warps=4,
                enable_fp_fusion=False,
            )

    formats = dict(zip(("rows", "n", "taps", "channels", "groups"), shape, strict=True))
    formats |= {"rows": bucket(formats["rows"]), "bits": call.bits, "perturb": call.perturb}
    formats |= {"dtype": dtype, "parts": parts, "out": y.dtype, "zero": call.zero_point is not None}
    formats |= {} if picture is None else {"stride": picture.stride, "width": picture.size[1]}
    by = partial(options, *shape[2:], heavy=heavy, splittable=splittable)
    with torch.cuda.device_of(y):
        op = "qlinear" if picture is None else "qconv2d"
        run(tuned(op, formats, cut, by, run, y.device))


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _words(packed: Tensor) -> Tensor:
    """uint8 [..., 4] as int32 [...]."""
    return (packed.clone() if packed.storage_offset() % 4 else packed).view(torch.int32)


def _blocks(cut: Tiles) -> dict[str, int]:
    return {"BLOCK_M": cut.m, "BLOCK_N": cut.n, "BLOCK_K": cut.k}
