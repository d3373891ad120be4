# SPDX-License-Identifier: Apache-2.0
"""What a call of `qlinear` or `qconv2d` consists of, and its checks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_kernels import rng
from zo_kernels.ops import _updates
from zo_kernels.packing import packed_sizes

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP32, INT8 = (torch.float32,), (torch.int8,)
INPUTS, RESULTS = (*FLOATS, torch.int8), (None, *FLOATS)
BITS, ACT_BITS = (8, 4), (16, 8)
ACTIVATIONS = ("none", "silu", "gelu")
PERTURBATIONS = ("none", "scale", "scale_relative", "weight", "codes")
MAX_K = 65536  # 65536 products of 128 and 255 are below 2^31
LANES = {8: 1, 4: 16}  # bits -> units of a lane in a step of one code
MAX_HEADROOM = {8: 127, 4: 15}
# What both schemas end with: the fields of `Call` from `bits` on.
SCHEMA_TAIL = (
    "int bits=8, int act_bits=16, Tensor? x_scale=None, Tensor? in_scale=None, "
    'str activation="none", Tensor? residual=None, str perturb="none", str kind="rademacher", '
    "SymInt seed=0, SymInt stream=0, SymInt[] draws=[], Tensor? coeffs=None, int headroom=0, "
    "ScalarType? out_dtype=None"
)


class Call(NamedTuple):
    """The arguments of `qlinear` in the order of its schema; `qconv2d` has its geometry besides."""

    x: Tensor
    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    bias: Tensor | None = None
    bits: int = 8
    act_bits: int = 16
    x_scale: Tensor | None = None
    in_scale: Tensor | None = None
    activation: str = "none"
    residual: Tensor | None = None
    perturb: str = "none"
    kind: str = "rademacher"
    seed: int = 0
    stream: int = 0
    draws: Sequence[int] = ()
    coeffs: Tensor | None = None
    headroom: int = 0
    out_dtype: torch.dtype | None = None

    @property
    def is_integer(self) -> bool:
        """Whether integers are accumulated."""
        return self.act_bits == 8 or self.x.dtype == torch.int8

    @property
    def wide(self) -> torch.dtype:
        """What sums are scaled and added in."""
        whole = self.is_integer or self.x.dtype != torch.float64
        return torch.float32 if whole else torch.float64

    @property
    def result_dtype(self) -> torch.dtype:
        if self.out_dtype is not None:
            return self.out_dtype
        return torch.float32 if self.x.dtype == torch.int8 else self.x.dtype

    @property
    def scale_groups(self) -> int:
        return 1 if self.scale.dim() == 1 else self.scale.shape[1]


KNOWN = {  # places in a `Call` -> what may stand there; a place is found faster than a name
    Call._fields.index(name): known
    for name, known in {
        "bits": BITS,
        "act_bits": ACT_BITS,
        "activation": ACTIVATIONS,
        "perturb": PERTURBATIONS,
        "kind": rng.KINDS,
        "out_dtype": RESULTS,
    }.items()
}


class Layer(NamedTuple):
    """What the shapes of a call say; outputs are [*lead, N] here, also those of a convolution.

    Attributes:
        op: its name.
        n: output channels N.
        taps, channels: the K = taps * channels terms of an output; channels are those of a group.
        lead: shape of the output without N.
        inputs: size of the axis of x that `in_scale` goes along.
        per_sample: an activation scale covers x[b], else a row x[..., :].
    """

    op: str
    n: int
    taps: int
    channels: int
    lead: tuple[int, ...]
    inputs: int
    per_sample: bool

    @property
    def k(self) -> int:
        return self.taps * self.channels


def refusal(op: str, name: str, requirement: str, got: object, advice: str) -> str:
    return f"{op}: {name} must be {requirement}, got {got}; {advice}"


def names(dtypes: Sequence[torch.dtype]) -> str:
    *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(most)} or {last}" if most else last


def check_tensor(
    op: str,
    name: str,
    value: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int] | None,
    device: torch.device,
    advice: str = "",
) -> None:
    """`device` is that of x; shape None is any."""
    if value.dtype not in dtypes:
        raise TypeError(refusal(op, name, names(dtypes), value.dtype, "cast it"))
    if shape is not None and value.shape != shape:
        raise ValueError(refusal(op, name, str(list(shape)), f"shape {list(value.shape)}", advice))
    check_device(op, name, value, device)


def check_device(op: str, name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        where = f"on the device of x ({device})"
        raise ValueError(refusal(op, name, where, value.device, "move the module or the input"))


def check_operands(op: str, call: Call, ok: bool, shape: str) -> None:
    """Raise unless x and scale have axes to read the sizes of a layer from.

    Args:
        ok: whether x is of `shape`.
    """
    x, scale = call.x, call.scale
    if x.dtype not in INPUTS:
        raise TypeError(refusal(op, "x", names(INPUTS), x.dtype, "cast it"))
    if not ok:
        got = f"shape {list(x.shape)}"
        raise ValueError(refusal(op, "x", shape, got, "check which layer it feeds"))
    if scale.dim() not in (1, 2) or not scale.numel():
        got = f"shape {list(scale.shape)}"
        advice = "one value per output channel, or per group of its inputs"
        raise ValueError(refusal(op, "scale", "[N] or [N, groups]", got, advice))


def check(call: Call, layer: Layer) -> None:
    """Raise unless the arguments fit each other; the values of tensors are not read."""
    op, x, device = layer.op, call.x, call.x.device
    is_codes = x.dtype == torch.int8
    for place, known in KNOWN.items():
        if call[place] not in known:
            name, got = Call._fields[place], repr(call[place])
            raise ValueError(refusal(op, name, f"one of {known}", got, "choose one"))
    _check_weight(call, layer, device)
    if call.bias is not None:
        advice = "give one value per output channel"
        check_tensor(op, "bias", call.bias, FLOATS, (layer.n,), device, advice)
    if call.in_scale is not None:
        advice = "give one value per input channel"
        check_tensor(op, "in_scale", call.in_scale, FP32, (layer.inputs,), device, advice)
    if call.x_scale is not None:
        shape = x.shape[:1] if layer.per_sample else x.shape[:-1]
        advice = "give what quantize_rows returned"
        check_tensor(op, "x_scale", call.x_scale, FP32, shape, device, advice)
    if call.residual is not None:
        advice = "give it the shape of the output"
        check_tensor(op, "residual", call.residual, FLOATS, _result(layer), device, advice)
    if is_codes != (call.x_scale is not None):
        got = f"x {x.dtype} {'with' if call.x_scale is not None else 'without'} x_scale"
        advice = "give what quantize_rows returned, or floating x alone"
        raise ValueError(refusal(op, "x_scale", "given where x is int8, else not", got, advice))
    if is_codes and call.in_scale is not None:
        advice = "give it to quantize_rows"
        raise ValueError(refusal(op, "in_scale", "None where x is int8", "one", advice))
    if call.is_integer and layer.k > MAX_K:
        advice = "use act_bits=16, or split the layer"
        limit = f"at most {MAX_K} where integers are accumulated in 32 bits"
        raise ValueError(refusal(op, "K", limit, layer.k, advice))
    _check_perturbation(call, layer)


def _result(layer: Layer) -> Sequence[int]:
    if not layer.per_sample:
        return *layer.lead, layer.n
    batch, *picture = layer.lead
    return batch, layer.n, *picture


def _check_weight(call: Call, layer: Layer, device: torch.device) -> None:
    op, qweight, scale = layer.op, call.qweight, call.scale
    check_tensor(op, "scale", scale, FP32, None, device)
    if qweight.dtype != torch.uint8:
        advice = "give what zo_kernels.packing.pack makes of the codes"
        raise TypeError(refusal(op, "qweight", "uint8", qweight.dtype, advice))
    shape = packed_sizes(layer.n, layer.taps, layer.channels, call.bits)
    if qweight.shape != shape:
        codes = f"{layer.n} rows of {layer.taps} * {layer.channels} codes of {call.bits} bits"
        advice = "check which layer x feeds, and that packing.pack of this version made it"
        requirement, got = f"{list(shape)}, {codes}", f"shape {list(qweight.shape)}"
        raise ValueError(refusal(op, "qweight", requirement, got, advice))
    check_device(op, "qweight", qweight, device)
    if not qweight.is_contiguous():
        got = f"strides {qweight.stride()}"
        raise ValueError(refusal(op, "qweight", "contiguous", got, "call .contiguous() once"))
    parts = call.scale_groups
    if parts > 1 and (layer.k % parts or layer.channels % (layer.k // parts)):
        requirement = f"of groups that divide the {layer.channels} input channels"
        got = f"{parts} groups for {layer.taps} * {layer.channels}"
        raise ValueError(refusal(op, "scale", requirement, got, "choose another group size"))
    if call.zero_point is not None:
        advice = "give one zero point for each scale"
        check_tensor(op, "zero_point", call.zero_point, INT8, scale.shape, device, advice)


def _check_perturbation(call: Call, layer: Layer) -> None:
    op, perturb, count, coeffs = layer.op, call.perturb, len(call.draws), call.coeffs
    if perturb == "none":
        if count or coeffs is not None:
            advice = "say what to perturb, or leave them out"
            raise ValueError(refusal(op, "draws", "none where perturb='none'", count, advice))
        return
    if not count:
        advice = "give one for each perturbation, or perturb='none'"
        raise ValueError(refusal(op, "draws", "at least one", 0, advice))
    if (
        coeffs is None
        or coeffs.shape != (count,)
        or coeffs.dtype != torch.float32
        or coeffs.device.type != "cpu"
    ):
        got = None if coeffs is None else f"{coeffs.dtype} {list(coeffs.shape)} on {coeffs.device}"
        requirement = f"a float32 tensor [{count}] on the CPU"
        raise ValueError(refusal(op, "coeffs", requirement, got, "give one for each draw"))
    if call.x.dim() < 2 or call.x.shape[0] % count:
        requirement = f"of a batch that {count} perturbations divide"
        got = f"shape {list(call.x.shape)}"
        raise ValueError(refusal(op, "x", requirement, got, "give each the same number of samples"))
    if not 0 <= call.stream <= rng.WORD:
        raise ValueError(refusal(op, "stream", "in [0, 2^32)", call.stream, "number from 0"))
    if not perturb.startswith("scale") and call.kind != "rademacher":
        requirement = f"'rademacher' where perturb={perturb!r}"
        raise ValueError(refusal(op, "kind", requirement, repr(call.kind), "perturb the scales"))
    if perturb == "codes":
        limit = MAX_HEADROOM[call.bits]
        if not 0 < call.headroom <= limit:
            requirement = f"1 to {limit} where perturb='codes'"
            advice = "quantize with headroom, or use perturb='weight'"
            raise ValueError(refusal(op, "headroom", requirement, call.headroom, advice))
        if call.zero_point is not None:
            advice = "use perturb='weight'"
            raise ValueError(refusal(op, "zero_point", "None where perturb='codes'", "one", advice))


def check_steps(op: str, coeffs: Tensor, headroom: int) -> None:
    """Raise unless the values of `coeffs` are what perturb="codes" takes.

    Raises:
        ValueError: one is not a whole number, or exceeds the headroom.
    """
    for c in coeffs.tolist():
        if not (abs(c) <= headroom and c == int(c)):
            requirement = f"whole numbers up to the headroom of {headroom}"
            advice = "round it, or use perturb='weight'"
            raise ValueError(refusal(op, "coeffs", requirement, c, advice))


def normalized(
    op: str,
    seed: int,
    draws: Sequence[int],
    coeffs: Sequence[float] | Tensor | None,
    perturb: str,
    headroom: int,
) -> tuple[int, list[int], Tensor | None]:
    """seed, draws and coeffs as the schema wants them."""
    if coeffs is not None and not isinstance(coeffs, Tensor):
        coeffs = _updates.float32(op, "coeffs", coeffs)
    elif coeffs is not None:
        coeffs = coeffs.contiguous()
    is_read = perturb == "codes" and headroom > 0 and not torch.compiler.is_compiling()
    if is_read and coeffs is not None and not coeffs.is_meta:
        check_steps(op, coeffs, headroom)
    wrapped = [_updates.int64(op, "draws", draw) for draw in draws]
    return _updates.int64(op, "seed", seed), wrapped, coeffs
