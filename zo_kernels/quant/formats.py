# SPDX-License-Identifier: Apache-2.0
"""How a quantized weight is described and kept in a file, whatever runs it.

A `Spec` says what the codes of a layer are: see there for the strings that name it.

| spec | codes | scale | activations |
|---|---|---|---|
| `w8` | int8, -127 to 127 where this package rounds | fp32, one per output channel | their dtype |
| `w4` | 4 bits, -7 to 7 where this package rounds | the same | their dtype |
| `w8a8`, `w4a8` | as above | as above | int8, rounded by the op: per row, per image |
| ... `-g32`, `-g64`, `-g128` | as above | one per group of input channels (and tap) | as above |
| ... `-asym` | all 256 or 16 of them, with a zero point per scale | as above | as above |

Files hold logical codes, in no kernel's layout: 8 bits as int8 in the shape of the weight; 4 bits
as uint8 [N, ceil(K / 2)], codes plus 8, two a byte along the K order of `zo_kernels.packing` (low
nibble first; where K is odd the last high nibble is code 0). The model's own layout is made from
them when a file is loaded.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_kernels.nn import Spec
from zo_kernels.nn._korder import chunks, from_rows, scratch, to_rows

__all__ = ["Spec", "from_stored", "stored_form", "to_stored"]


_CHUNK = 1 << 20  # codes that are unpacked at a time


def stored_form(shape: Sequence[int], bits: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape of the codes of a weight [N, K] or [N, C, kh, kw] in a file."""
    if bits == 8:
        return torch.int8, tuple(shape)
    return torch.uint8, (shape[0], (torch.Size(shape[1:]).numel() + 1) // 2)


def to_stored(codes: Tensor, bits: int) -> Tensor:
    """int8 codes in the shape of the weight -> what a file keeps."""
    if bits == 8:
        return codes
    rows = to_rows(codes) + 8  # [N, K], 0 to 15
    rows = F.pad(rows, (0, rows.shape[1] % 2), value=8).view(torch.uint8)
    return rows[:, ::2] | rows[:, 1::2] << 4


def from_stored(stored: Tensor, shape: Sequence[int], bits: int) -> Tensor:
    """The inverse of `to_stored`: int8 codes in `shape`."""
    if bits == 8:
        return stored
    rows = scratch(shape, stored.device)
    for part in chunks(rows, _CHUNK):
        pairs = torch.stack((stored[part] & 15, stored[part] >> 4), dim=2).flatten(1)
        rows[part] = pairs[:, : rows.shape[1]].view(torch.int8) - 8
    return from_rows(rows, shape)
