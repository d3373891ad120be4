# SPDX-License-Identifier: Apache-2.0
import itertools
import math
import re

import pytest
import torch
from quantized_twins import misaligned, strided

from zo_kernels.packing import PACKING, STEP, pack, packed_shape, unpack
from zo_kernels.testing import SIZES

SHAPES = [
    *((n, 63) for n in SIZES),
    *((7, k) for k in SIZES),
    (16, 8),
    (16, 8, 3, 3),
    (33, 5, 3, 2),
    (1, 1, 1, 1),
    (40, 12, 1, 1),
    (17, 1, 5, 5),
]


def codes_of(shape, bits=8):
    g = torch.Generator().manual_seed(0)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=g)


def by_definition(codes, bits):
    """The layout of the module's text, byte by byte."""
    n, c, *kernel = codes.shape
    taps, half = math.prod(kernel), 2 ** (bits - 1)
    flat = codes.reshape(n, c, taps)
    panels, steps, lanes, width = packed_shape(codes.shape, bits)
    packed = torch.zeros(panels, steps, lanes, width, dtype=torch.uint8)
    per_tap = steps // taps

    def stored(row, t, channel):
        return half + (int(flat[row, channel, t]) if row < n and channel < c else 0)

    for p, t, j, lane, i in itertools.product(*map(range, (panels, taps, per_tap, lanes, width))):
        if bits == 8:
            value = stored(16 * p + lane, t, 4 * j + i)
        else:
            low, high = (stored(16 * p + lane, t, 8 * j + 4 * upper + i) for upper in (0, 1))
            value = low | high << 4
        packed[p, t * per_tap + j, lane, i] = value
    return packed


@pytest.mark.parametrize("bits", STEP)
@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (17, 8), (18, 9, 3, 2), (16, 4, 1, 1)])
def test_the_layout(shape, bits):
    codes = codes_of(shape, bits)
    packed = pack(codes, bits)
    assert packed.is_contiguous()
    assert torch.equal(packed, by_definition(codes, bits))
    assert PACKING == 1  # another layout takes another number


@pytest.mark.parametrize("bits", STEP)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_is_the_inverse(shape, bits):
    codes = codes_of(shape, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == packed_shape(shape, bits)
    back = unpack(packed, shape, bits)
    assert back.is_contiguous() and torch.equal(back, codes)
    assert torch.equal(pack(strided(codes), bits), packed)
    assert torch.equal(pack(misaligned(codes), bits), packed)
    for other in (strided(packed), misaligned(packed)):
        assert torch.equal(unpack(other, shape, bits), codes)
    if len(shape) == 4:
        assert torch.equal(pack(codes.to(memory_format=torch.channels_last), bits), packed)


@pytest.mark.parametrize("bits", STEP)
def test_every_code(bits):
    half = 2 ** (bits - 1)
    codes = torch.arange(-half, half, dtype=torch.int8).view(1, -1)
    assert torch.equal(unpack(pack(codes, bits), codes.shape, bits), codes)


def test_inputs_are_not_changed():
    for bits in STEP:
        codes = codes_of((16, 8), bits)
        packed, before = pack(codes, bits), codes.clone()
        kept = packed.clone()
        unpack(packed, codes.shape, bits)
        assert torch.equal(codes, before) and torch.equal(packed, kept)


def test_half_a_byte_for_four_bits():
    assert pack(codes_of((32, 64), 4), 4).nbytes == 32 * 64 // 2
    assert pack(codes_of((32, 64)), 8).nbytes == 32 * 64


@pytest.mark.parametrize("bits", STEP)
@pytest.mark.parametrize("shape", [(7, 63), (18, 9, 3, 3)])
def test_meta_tensors(shape, bits):
    packed = pack(torch.empty(shape, dtype=torch.int8, device="meta"), bits)
    assert packed.is_meta and packed.shape == packed_shape(shape, bits)
    assert unpack(packed, shape, bits).shape == shape


CODES = torch.zeros(7, 9, dtype=torch.int8)
PACKED = pack(CODES)
NO_AXIS = "shape must be [N, K] or [N, C, kh, kw] without an empty axis, got "
BAD = [
    (TypeError, "pack: codes must be int8, got torch.uint8", pack, CODES.byte()),
    (TypeError, "pack: codes must be int8, got torch.float32", pack, CODES.float()),
    (ValueError, "pack: bits must be 8 or 4, got 2", pack, CODES, 2),
    (ValueError, f"pack: {NO_AXIS}[63]", pack, CODES.view(-1)),
    (ValueError, f"pack: {NO_AXIS}[0, 9]", pack, CODES[:0]),
    (ValueError, f"pack: {NO_AXIS}[7, 0]", pack, CODES[:, :0]),
    (ValueError, "pack: codes must be -8 to 7 with 4 bits, got 8 to 8", pack, CODES + 8, 4),
    (ValueError, "pack: codes must be -8 to 7 with 4 bits, got -9 to -9", pack, CODES - 9, 4),
    (TypeError, "unpack: packed must be uint8, got torch.int8", unpack, PACKED.char(), (7, 9)),
    (ValueError, "unpack: packed must be [1, 4, 16, 4] for 8 bits of", unpack, PACKED, (7, 13)),
    (ValueError, "unpack: packed must be [1, 2, 16, 4] for 4 bits of", unpack, PACKED, (7, 9), 4),
    (ValueError, "unpack: packed must be [2, 3, 16, 4] for 8 bits of", unpack, PACKED, (17, 9)),
    (ValueError, "another version of the layout than 1", unpack, PACKED, (17, 9)),
    (ValueError, "unpack: bits must be 8 or 4, got 16", unpack, PACKED, (7, 9), 16),
    (ValueError, "packed_shape: bits must be 8 or 4, got 3", packed_shape, (7, 9), 3),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    kind, text, function, *args = BAD[case]
    with pytest.raises(kind, match=re.escape(text)):
        function(*args)
