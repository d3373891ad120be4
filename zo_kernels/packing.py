# SPDX-License-Identifier: Apache-2.0
"""How a quantized weight lies in memory while a model runs: one layout for every backend.

A weight of N rows is cut into panels of 16 rows, the lanes of a vector of 64 bytes; a panel holds,
one step after another, 4 (8 bits) or 8 (4 bits) consecutive channels of its rows. So a kernel reads
a panel from front to back, and one 64-byte load feeds an instruction that multiplies and adds four
bytes a lane. Codes are stored without a sign, u = q + 2^(bits - 1): the layout is uint8

    [ceil(N / 16), taps * ceil(C / step), 16, 4]

with taps = kh * kw and C channels per group for a convolution [N, C, kh, kw], taps = 1 and C = K
for a linear layer [N, K].

8 bits: byte [p, t * ceil(C / 4) + j, l, i] is row 16 p + l, tap t = r * kw + s, channel 4 j + i.
4 bits: in byte [p, t * ceil(C / 8) + j, l, i] the low nibble is channel 8 j + i, the high nibble
channel 8 j + 4 + i. Places beyond N or C hold code 0.

The K index of an element is k = t * C + c: channels run fastest, as in a channels_last image.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PACKING = 1  # version of this layout; whoever stores packed tensors stores it beside them
PANEL = 16  # rows
STEP = {8: 4, 4: 8}  # bits -> channels of a row that four bytes hold
_OFFSET = {8: 0x80, 4: 0x08}  # code 0 as it is stored


def packed_shape(shape: Sequence[int], bits: int = 8) -> tuple[int, int, int, int]:
    """Shape of the packed form of a weight.

    Args:
        shape: (N, K), or (N, C, kh, kw) with C channels per group.
        bits: 8 or 4.

    Raises:
        ValueError: other bits, another number of dimensions, or an empty weight.
    """
    return packed_sizes(*_sizes("packed_shape", shape, bits), bits)


def packed_sizes(n: int, taps: int, channels: int, bits: int) -> tuple[int, int, int, int]:
    """Unchecked: `packed_shape` of a weight [N, taps, C]."""
    return -(-n // PANEL), taps * -(-channels // STEP[bits]), PANEL, 4


def pack(codes: Tensor, bits: int = 8) -> Tensor:
    """Codes of a weight in the layout of this module.

    Args:
        codes: int8 [N, K] or [N, C, kh, kw], any strides; -128 to 127, or -8 to 7 with 4 bits.
        bits: 8 or 4.

    Returns:
        uint8 of `packed_shape(codes.shape, bits)`, on the device of `codes`.

    Raises:
        TypeError: codes are not int8.
        ValueError: other bits, another shape, or codes beyond 4 bits.
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"pack: codes must be int8, got {codes.dtype}; quantize the weight first")
    n, taps, channels = _sizes("pack", codes.shape, bits)
    if bits == 4 and not codes.is_meta:
        low, high = (int(bound) for bound in codes.aminmax())
        if low < -8 or high > 7:
            raise ValueError(
                f"pack: codes must be -8 to 7 with 4 bits, got {low} to {high}; "
                "quantize to 4 bits, or pack with bits=8"
            )
    rows = codes.movedim(1, -1).reshape(n, taps, channels)
    if (beyond := -channels % STEP[bits]) or n % PANEL:
        rows = F.pad(rows, (0, beyond, 0, 0, 0, -n % PANEL))
    rows = rows.view(torch.uint8)
    if bits == 8:
        lanes = rows.bitwise_xor(_OFFSET[8])
    else:
        low_half, high_half = (rows + _OFFSET[4] & 15).unflatten(-1, (-1, 2, 4)).unbind(-2)
        lanes = low_half.bitwise_or(high_half << 4)
    panels, steps, _, _ = packed_shape(codes.shape, bits)
    return _words_moved(lanes.reshape(panels, PANEL, steps, 4))


def unpack(packed: Tensor, shape: Sequence[int], bits: int = 8) -> Tensor:
    """The inverse of `pack`: int8 codes, contiguous in `shape`.

    Args:
        packed: uint8 of `packed_shape(shape, bits)`.
        shape: (N, K), or (N, C, kh, kw) with C channels per group.
        bits: 8 or 4.

    Raises:
        TypeError: packed is not uint8.
        ValueError: other bits, or a shape that packs into another one than `packed` has.
    """
    n, taps, channels = _sizes("unpack", shape, bits)
    if packed.dtype != torch.uint8:
        raise TypeError(
            f"unpack: packed must be uint8, got {packed.dtype}; give what pack returned"
        )
    if tuple(packed.shape) != packed_shape(shape, bits):
        raise ValueError(
            f"unpack: packed must be {list(packed_shape(shape, bits))} for {bits} bits of "
            f"{tuple(shape)}, got {list(packed.shape)}; it belongs to another layer, other bits or "
            f"another version of the layout than {PACKING}"
        )
    rows = unpack_rows(packed, n, taps, channels, bits)
    if len(shape) == 2:
        return rows.view(*shape)
    return rows.view(n, *shape[2:], channels).movedim(-1, 1).contiguous()


def unpack_rows(packed: Tensor, n: int, taps: int, channels: int, bits: int) -> Tensor:
    """Unchecked: int8 codes [N, taps, C], contiguous, so that a row is in the order of k."""
    lanes = _words_moved(packed)  # [panels, 16, steps, 4]
    if bits == 8:
        rows = lanes.bitwise_xor_(_OFFSET[8]).view(torch.int8)
    else:
        lanes = lanes.unsqueeze(-2)
        rows = torch.cat((lanes & 15, lanes >> 4), dim=-2).view(torch.int8).sub_(_OFFSET[4])
    rows = rows.reshape(-1, taps, packed.shape[1] // taps * STEP[bits])
    return rows[:n, :, :channels].contiguous()


def _words_moved(x: Tensor) -> Tensor:
    """uint8 [P, a, b, 4] -> [P, b, a, 4], four bytes at a time."""
    if x.storage_offset() % 4 or not x.is_contiguous():
        x = x.clone(memory_format=torch.contiguous_format)
    words = x.view(torch.int32).transpose(1, 2)
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _sizes(function: str, shape: Sequence[int], bits: int) -> tuple[int, int, int]:
    """N, taps and C of a weight."""
    if bits not in STEP:
        raise ValueError(f"{function}: bits must be 8 or 4, got {bits}; choose one of them")
    if len(shape) not in (2, 4) or min(shape) < 1:
        raise ValueError(
            f"{function}: shape must be [N, K] or [N, C, kh, kw] without an empty axis, "
            f"got {list(shape)}; give codes in the shape of the weight"
        )
    return shape[0], math.prod(shape[2:]), shape[1]
