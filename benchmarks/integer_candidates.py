# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks.integer_ops` times on one shape: this package's ops, and what torch offers.

Every candidate starts from fp32 activations and ends in fp32, rounding included, but for those
called "alone", which are given the codes. Layers have a bias. Weights repeat in the caches as they
do not in a model: large products hide that, and small ones take turns over many weights instead.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.sd15 import ConvShape, LinearShape
from zo_kernels._registry import OPS, REFERENCE, RUNS
from zo_kernels.ops import qconv2d, qlinear, quantize_rows
from zo_kernels.packing import pack

OUR_FORMATS = {"w8a8": (8, 1), "w4a8": (4, 1), "w4a8-g64": (4, 64)}  # bits, group (1: none)
ALONE = "w8a8, product alone"
CODES = "w8a8, codes +1"
PAIR = "w8a8, codes +1 and -1, twice the rows"
INT_MM = "torch._int_mm, rounding and scaling apart"
INT_MM_ALONE = "torch._int_mm alone"
ONEDNN = "oneDNN int8, rounding apart"
ONEDNN_ALONE = "oneDNN int8, product alone"
FP32 = "torch fp32"
BF16 = "torch bf16"

# The fastest way that torch has to round a tensor; it will go one day.
warnings.filterwarnings("ignore", "torch.quantize_per_tensor")


@dataclass
class Candidate:
    """A call on one shape.

    work: its multiplications over those of the shape (2 where it takes twice the rows).
    backend: what ran it, for our ops: "cpp", or "reference", which is no kernel.
    error: how far its result is from fp32's, in the 2-norm; None where it computes something else.
    """

    name: str
    call: Callable[[], object]
    work: int = 1
    backend: str = ""
    error: float | None = field(default=None)


def which_backend(op: str, call: Callable[[], object]) -> str:
    """Runs `call` once: "reference" if that ran, else the one that was counted, else C++."""
    before = RUNS.copy()
    call()
    for name in (REFERENCE, *(b.name for b in OPS[op].backends)):
        if RUNS[op, name] > before[op, name]:
            return name
    return "cpp"  # which does not count its calls


class Ours:
    """One layer in every format: the same random weight, rounded to each."""

    def __init__(self, op: str, weight: Tensor, bias: Tensor, **geometry: Any) -> None:
        self.op, self.bias, self.geometry = op, bias, geometry
        self._formats = {
            name: _rounded(weight, bits, group)
            for name, (bits, group) in OUR_FORMATS.items()
            if group == 1 or weight.shape[1] % group == 0
        }

    def formats(self) -> Sequence[str]:
        return list(self._formats)

    def call(self, name: str, x: Tensor, **more: Any) -> Callable[[], Tensor]:
        packed, scale = self._formats[name]
        function: Any = qlinear if self.op == "qlinear" else qconv2d
        options = {"bits": OUR_FORMATS[name][0], "act_bits": 8} | self.geometry | more
        return lambda: function(x, packed, scale, bias=self.bias, **options)


def _rounded(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Packed codes and scale of weight [N, C, ...]: absmax over each row, or over `group` channels
    of each tap. One code of headroom is kept for noise."""
    rows = weight.flatten(2).transpose(1, 2).flatten(1) if weight.dim() == 4 else weight
    n, k = rows.shape
    grouped = rows.reshape(n, -1, k if group == 1 else group)
    most = 126 if bits == 8 else 7
    scale = grouped.abs().amax(2).clamp_min(1e-9) / most
    codes = (grouped / scale[..., None]).round().clamp(-most, most).to(torch.int8).view(n, k)
    if weight.dim() == 4:
        kernel = weight.shape[2:]
        codes = codes.view(n, *kernel, -1).permute(0, 3, 1, 2).contiguous()
    return pack(codes, bits), scale.squeeze(1) if group == 1 else scale


def _ours(layer: Ours, x: Tensor) -> list[Candidate]:
    noise: dict[str, Any] = {"perturb": "codes", "seed": 1, "stream": 1, "headroom": 1}
    one = noise | {"draws": [0], "coeffs": torch.ones(1)}
    two = noise | {"draws": [0, 0], "coeffs": torch.tensor([1.0, -1.0])}
    rows = layer.op == "qlinear"
    codes, x_scale = quantize_rows(x, per_sample=not rows)
    twice = torch.stack((x, x)) if rows else torch.cat((x, x))
    if not rows:
        twice = twice.contiguous(memory_format=torch.channels_last)
    made = [(name, layer.call(name, x), 1) for name in layer.formats()]
    made.append((ALONE, layer.call("w8a8", codes, x_scale=x_scale), 1))
    made.append((CODES, layer.call("w8a8", x[None] if rows else x, **one), 1))
    made.append((PAIR, layer.call("w8a8", twice, **two), 2))
    return [Candidate(name, call, work, which_backend(layer.op, call)) for name, call, work in made]


def linear(shape: LinearShape) -> list[Candidate]:
    """Every candidate on one product [M, K] x [N, K]^T."""
    weight, bias, x = _random(shape.n, shape.k), _random(shape.n), _random(shape.m, shape.k)
    weight /= shape.k**0.5
    return _checked(
        _ours(Ours("qlinear", weight, bias), x) + _torch_linear(weight, bias, x),
        F.linear(x, weight, bias),
    )


def _torch_linear(weight: Tensor, bias: Tensor, x: Tensor) -> list[Candidate]:
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    transposed = codes.t()

    def int_mm() -> Tensor:
        x_scale = x.abs().amax(1, keepdim=True) / 127
        rounded = (x / x_scale).round_().to(torch.int8)
        product = torch._int_mm(rounded, transposed)
        return product.float().mul_(x_scale).mul_(scale).add_(bias)

    x_codes = quantize_rows(x)[0]
    ops, zeros = torch.ops.onednn, torch.zeros(weight.shape[0], dtype=torch.int32)
    prepacked = ops.qlinear_prepack(codes, list(x.shape))

    def onednn(x_codes: Tensor, x_scale: float) -> Tensor:
        more = (scale, zeros, bias, 1.0, 0, torch.float32, "none", [], "")
        y: Tensor = ops.qlinear_pointwise(x_codes, x_scale, 128, prepacked, *more)
        return y

    fixed = _rounded_tensor(x)
    half = [t.bfloat16() for t in (x, weight, bias)]
    return [
        Candidate(INT_MM, int_mm),
        Candidate(INT_MM_ALONE, lambda: torch._int_mm(x_codes, transposed)),
        Candidate(ONEDNN, lambda: onednn(*_rounded_tensor(x))),
        Candidate(ONEDNN_ALONE, lambda: onednn(*fixed)),
        Candidate(FP32, lambda: F.linear(x, weight, bias)),
        Candidate(BF16, lambda: F.linear(*half)),
    ]


def conv(shape: ConvShape) -> list[Candidate]:
    """Every candidate on one convolution of a picture, channels_last."""
    k = shape.c * shape.kernel**2
    weight = _random(shape.n, shape.c, shape.kernel, shape.kernel) / k**0.5
    bias = _random(shape.n)
    x = _random(1, shape.c, shape.size, shape.size).contiguous(memory_format=torch.channels_last)
    geometry = {"stride": shape.stride, "padding": shape.kernel // 2}
    ours = Ours("qconv2d", weight, bias, kernel_size=shape.kernel, **geometry)
    return _checked(
        _ours(ours, x) + _torch_conv(weight, bias, x, geometry),
        F.conv2d(x, weight, bias, **geometry),
    )


def _torch_conv(
    weight: Tensor, bias: Tensor, x: Tensor, geometry: dict[str, int]
) -> list[Candidate]:
    stride, padding = ([geometry[name]] * 2 for name in ("stride", "padding"))
    around = (stride, padding, [1, 1], 1)
    scale = weight.abs().amax((1, 2, 3)) / 127
    codes = (weight / scale.view(-1, 1, 1, 1)).round().to(torch.int8)
    ops, zeros = torch.ops.onednn, torch.zeros(weight.shape[0], dtype=torch.int32)
    x_codes, x_scale = _rounded_tensor(x)
    prepacked = ops.qconv_prepack(codes, scale, x_scale, 128, *around, list(x.shape))

    def onednn(x_codes: Tensor, x_scale: float) -> Tensor:
        more = (1.0, 0, torch.float32, "none", [], "")
        y: Tensor = ops.qconv2d_pointwise(
            x_codes, x_scale, 128, prepacked, scale, zeros, bias, *around, *more
        )
        return y

    last = torch.channels_last
    weight = weight.contiguous(memory_format=last)
    half = [t.bfloat16() for t in (x, weight, bias)]
    return [
        Candidate(ONEDNN, lambda: onednn(*_rounded_tensor(x))),
        Candidate(ONEDNN_ALONE, lambda: onednn(x_codes, x_scale)),
        Candidate(FP32, lambda: F.conv2d(x, weight, bias, **geometry)),
        Candidate(BF16, lambda: F.conv2d(*half, **geometry)),
    ]


def small(rows: int, n: int, k: int, copies: int) -> list[Candidate]:
    """Few rows through a large weight, a different copy of it each call, so that it comes from
    memory: what counts is the bytes of the weight."""
    weight, bias, x = _random(n, k) / k**0.5, _random(n), _random(rows, k)
    ours = Ours("qlinear", weight, bias)
    made = []
    for name in ours.formats():
        packed, scale = ours._formats[name]
        copied = cycle([packed.clone() for _ in range(copies)])
        bits = OUR_FORMATS[name][0]

        def call(copied: Any = copied, scale: Tensor = scale, bits: int = bits) -> Tensor:
            return qlinear(x, next(copied), scale, bias=bias, bits=bits, act_bits=8)

        made.append(Candidate(name, call, 1, which_backend("qlinear", call)))
    weights = cycle([weight.clone() for _ in range(copies)])
    made.append(Candidate(FP32, lambda: F.linear(x, next(weights), bias)))
    return _checked(made, F.linear(x, weight, bias))


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


def _rounded_tensor(x: Tensor) -> tuple[Tensor, float]:
    """u8 codes with zero point 128 and one scale for all of x, as oneDNN's ops want them."""
    low, high = x.aminmax()
    scale = max(-float(low), float(high)) / 127
    return torch.quantize_per_tensor(x, scale, 128, torch.quint8).int_repr(), scale


def _checked(made: list[Candidate], expected: Tensor) -> list[Candidate]:
    """Notes the error of each; noise on the codes and the bare sums are something else."""
    for candidate in made:
        if candidate.name in (CODES, PAIR, INT_MM_ALONE):
            continue
        y = candidate.call()
        assert isinstance(y, Tensor)
        candidate.error = float((y.float() - expected).norm() / expected.norm())
    return made
