# SPDX-License-Identifier: Apache-2.0
"""`load_quanto`: int8 weights of optimum-quanto (`quantize(model, weights=qint8)`, `freeze`).

Its state dict has, for a weight `x`, `x._data` (int8) and `x._scale` ([N, 1, ...] for axis 0, in
the dtype of the model), and for each quantized module `input_scale` and `output_scale`, which are
used only where activations were calibrated.
"""

import torch
from torch import Tensor, nn

from zo_kernels.nn import Spec
from zo_kernels.quant._fill import Integers
from zo_kernels.quant._safetensors import Entry
from zo_kernels.quant.convert import QuantReport
from zo_kernels.quant.imports._assemble import Source, assemble_, entries_of, per_channel

_WHERE = "load_quanto"
_ACTIVATIONS = ("input_scale", "output_scale")


def load_quanto(model: nn.Module, source: Source, *, act_bits: int = 16) -> QuantReport:
    """Turn a float `model` into a quantized one with the int8 weights of optimum-quanto.

    scale * code is, in fp32, exactly what quanto dequantizes (in the dtype of its scale, which
    rounds that product once more where it is 16 bits). Static scales of activations are dropped.

    Example:
        >>> quantize(unet, weights=qint8); freeze(unet); state = unet.state_dict()  # quanto
        >>> load_quanto(UNet2DConditionModel.from_config(config), state)

    Args:
        model: the architecture before quanto; it may be on the meta device. Floats take its dtypes.
        source: quanto's state dict, or safetensors that hold it (file, index or folder).
        act_bits: 16: activations keep their dtype, as quanto's weight-only layers; 8: the ops round
            them to int8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: weights of another type than qint8 or scales along another axis; or a source
            that does not fit the model.
    """
    rest = dict(entries_of(source, _WHERE))
    integers = {}
    for key in [key for key in rest if key.endswith("._data")]:
        name = key.removesuffix("._data")
        data, scale = rest.pop(key), rest.pop(f"{name}._scale", None)
        _check(name, data, scale, f"{name}._shift" in rest)
        assert scale is not None
        integers[name] = _integers(data, scale)
    for key in [key for key in rest if key.rpartition(".")[2] in _ACTIVATIONS]:
        del rest[key]
    return assemble_(model, integers, rest, act_bits, _WHERE)


def _check(name: str, data: Entry, scale: Entry | None, shifted: bool) -> None:
    if data.dtype != torch.int8 or scale is None or shifted:
        got = f"{data.dtype}{' in groups' if shifted else ''}{'' if scale else ' without one'}"
        raise ValueError(
            f"{_WHERE}: {name.removesuffix('._data')} must be qint8 with a scale, got {got}; "
            "other types of quanto have no exact counterpart: quantize the float model"
        )
    rows = (data.shape[0], *[1] * (len(data.shape) - 1))
    if scale.shape not in ((), (1,), rows):
        raise ValueError(
            f"{_WHERE}: {name}._scale must be one value per output channel, {list(rows)}, got "
            f"{list(scale.shape)}; quantize along axis 0"
        )


def _integers(data: Entry, scale: Entry) -> Integers:
    spec, shape = Spec(), data.shape

    def scales() -> Tensor:
        return per_channel(scale.make().float(), spec, shape)

    return Integers(spec, shape, data.make, scales)
