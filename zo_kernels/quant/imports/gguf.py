# SPDX-License-Identifier: Apache-2.0
"""`load_gguf`: Q8_0 and Q4_0 weights of a GGUF file.

A block of 32 with its fp16 scale is a group of 32 with an fp32 scale that happens to be an fp16
number: specs w8-g32 and w4-g32, exactly.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from zo_kernels.nn import Spec
from zo_kernels.quant._fill import Integers
from zo_kernels.quant._safetensors import Entry
from zo_kernels.quant.convert import QuantReport
from zo_kernels.quant.imports._assemble import assemble_, per_channel
from zo_kernels.quant.imports._gguf_file import BITS, BLOCK, GGUF

_WHERE = "load_gguf"


def load_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    rename: Mapping[str, str] | Callable[[str], str | None] | None = None,
    act_bits: int = 16,
) -> QuantReport:
    """Turn a float `model` into a quantized one with the Q8_0 and Q4_0 weights of a GGUF file.

    Weights of linear layers and 1x1 convolutions become w8-g32 and w4-g32, exactly. Other quantized
    tensors become the floats that they stand for: embeddings, and larger kernels, whose blocks run
    over the taps of a channel where groups of a module run over channels. Tensor by tensor: nothing
    is held twice.

    Args:
        model: the architecture of the file; it may be on the meta device. Floats take its dtypes.
        path: a `.gguf` file.
        rename: tensor's name in the file -> name in the model's state dict; a function may answer
            None for a tensor that is not needed, names that a mapping lacks are kept. Files of
            stable-diffusion.cpp and ComfyUI have the names of the original checkpoints.
        act_bits: 16: activations keep their dtype; 8: the ops round them to int8, as ggml does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, tensors of other types (Q4_K, ...), scales that are not finite,
            or a file that does not fit the model.
    """
    file = GGUF(path)
    integers: dict[str, Integers] = {}
    floats: dict[str, tuple[Entry, str]] = {}
    rest: dict[str, Entry] = {}
    for name, tensor in file.tensors.items():
        target = _renamed(name, rename)
        if target is None:
            continue
        if target in integers or target in rest or target in floats:
            raise ValueError(
                f"{_WHERE}: rename must give every tensor a name of its own, got {target!r} twice; "
                "answer None for tensors that are not needed"
            )
        if tensor.kind not in BITS:
            rest[target] = _entry(file, name)
        elif _grouped(tensor.shape):
            integers[target] = _integers(file, name)
        else:
            floats[target] = _entry(file, name), "its blocks do not run over input channels"
    return assemble_(model, integers, rest, act_bits, _WHERE, floats)


def _renamed(name: str, rename: Any) -> str | None:
    if rename is None:
        return name
    return rename(name) if callable(rename) else rename.get(name, name)


def _grouped(shape: tuple[int, ...]) -> bool:
    """Whether blocks of the row-major order are groups of input channels."""
    return len(shape) in (2, 4) and shape[1] % BLOCK == 0 and math.prod(shape[2:]) == 1


def _integers(file: GGUF, name: str) -> Integers:
    tensor = file.tensors[name]
    spec = Spec(BITS[tensor.kind], 16, BLOCK)
    return Integers(
        spec,
        tensor.shape,
        lambda: file.codes(name),
        lambda: per_channel(file.scales(name), spec, tensor.shape),
    )


def _entry(file: GGUF, name: str) -> Entry:
    return Entry(file.dtype(name), file.tensors[name].shape, lambda: file.values(name))
