# SPDX-License-Identifier: Apache-2.0
"""What the tests of quantized ops share: every backend, twins in numpy, and fp64 mathematics.

The twins repeat the steps of the integer path in numpy, one fp32 operation each, so that results
can be compared to the bit. They share nothing with the package but the noise, which has tests of
its own.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import zo_kernels.ops  # noqa: F401  (declares them)
from zo_kernels import _native
from zo_kernels._registry import OPS, use_backend
from zo_kernels.packing import pack
from zo_kernels.rng import noise_numpy
from zo_kernels.testing import assert_same_bits, ran

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
C = _native.binding()
BACKENDS = ["reference"]
CPP, TRITON = OPS["qlinear"].backends
if CPP.available() is None:
    BACKENDS += [f"cpp {isa}" for isa in C.cpu_isas_available()]
if TRITON.available() is None:
    BACKENDS.append("triton")


def _on(device, value):
    """What is a tensor, or made of them, there; strides stay."""
    if isinstance(value, tuple):
        return tuple(_on(device, x) for x in value)
    if not isinstance(value, Tensor) or value.device.type == device:
        return value
    if 0 in value.stride():  # expanded
        return value.to(device)
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)


def everywhere(function, *args, **kwargs):
    """Name and result, on the CPU, for the reference and for each backend that runs this call."""
    before = C.cpu_isa() if C is not None else None
    op = function.__name__
    for backend in BACKENDS:
        name, _, isa = backend.partition(" ")
        if isa:
            C.set_isa(isa)
        device = "cuda" if name == "triton" else "cpu"
        there = {k: v if k == "coeffs" else _on(device, v) for k, v in kwargs.items()}
        try:
            with use_backend(name), ran(op, name):
                result = _on("cpu", function(*_on(device, args), **there))
        except RuntimeError as error:
            if "backend must be one that can run this call" not in str(error):
                raise
            continue
        finally:
            if isa:
                C.set_isa(before)
        yield backend, result


def assert_same_numbers(actual, expected, backend):
    """The same bits, but any nan equals any other."""
    assert torch.equal(actual.isnan(), expected.isnan()), backend
    try:
        assert_same_bits(*(torch.where(x.isnan(), 0.0, x) for x in (actual, expected)))
    except AssertionError as error:
        raise AssertionError(f"{backend}: {error}") from error


@dataclass
class Weight:
    """Random codes [N, K] or [N, C, kh, kw], with scales of weights that are N(0, 1 / K)."""

    shape: tuple[int, ...]
    bits: int = 8
    groups: int = 1
    zero: bool = False
    headroom: int = 0
    seed: int = 0
    codes: Tensor = field(init=False)
    scale: Tensor = field(init=False)
    zero_point: Tensor | None = field(init=False, default=None)

    def __post_init__(self):
        g = torch.Generator().manual_seed(self.seed)
        most = (127 if self.bits == 8 else 7) - (self.headroom if self.bits == 8 else 0)
        n, k = self.shape[0], int(np.prod(self.shape[1:]))
        self.codes = torch.randint(-most, most + 1, self.shape, dtype=torch.int8, generator=g)
        scale = (torch.rand(n, self.groups, generator=g) + 0.5) / (0.6 * most * k**0.5)
        self.scale = scale[:, 0] if self.groups == 1 else scale
        if self.zero:
            low = -128 if self.bits == 8 else -8
            zeros = torch.randint(low, -low, scale.shape, dtype=torch.int8, generator=g)
            self.zero_point = zeros[:, 0] if self.groups == 1 else zeros

    @property
    def arguments(self):
        packed = pack(self.codes, self.bits)
        return {"qweight": packed, "zero_point": self.zero_point} | {
            "scale": self.scale,
            "bits": self.bits,
        }

    @cached_property
    def rows(self):
        """int64 [N, G, K / G], in the order of k, without the zero points."""
        n = self.shape[0]
        codes = self.codes.movedim(1, -1).reshape(n, self.groups, -1).long().numpy()
        zero = 0 if self.zero_point is None else self.zero_point.long().view(n, -1, 1).numpy()
        return codes - zero

    def real(self, noise=None, p=0):
        """The weight in fp64, in its shape; perturbed where there is noise."""
        n, parts = self.shape[0], self.rows.astype(np.float64)
        scale = self.scale.double().view(n, -1, 1).numpy()
        if noise is not None:
            c, z = noise.coeffs[p], noise.z(p, scale.shape).astype(np.float64)
            if noise.perturb == "scale":
                scale = scale + c * z
            elif noise.perturb == "scale_relative":
                scale = scale * (1 + c * z)
            else:
                unit = 16 if noise.perturb == "codes" and self.bits == 4 else 1
                parts = parts + c / unit * noise.signs(p, parts.shape)
        taps_last = (n, *self.shape[2:], self.shape[1])
        return torch.from_numpy(parts * scale).reshape(taps_last).movedim(-1, 1)


@dataclass
class Noise:
    perturb: str
    coeffs: list[float]
    kind: str = "rademacher"
    seed: int = 2**63 + 5
    stream: int = 2**32 - 1
    draws: list[int] = field(default_factory=lambda: [3, 2**40 + 1, -2, 0])
    headroom: int = 0

    @property
    def arguments(self):
        return dict(vars(self))

    def one(self, p):
        """The arguments of perturbation p alone."""
        one = {"draws": [self.draws[p]], "coeffs": [self.coeffs[p]]}
        return self.arguments | one

    def z(self, p, shape):
        if not self.perturb.startswith("scale"):
            return np.zeros(shape, np.float32)
        return self._drawn(p, shape, self.kind)

    def signs(self, p, shape):
        return self._drawn(p, shape, "rademacher").astype(np.int64)

    def _drawn(self, p, shape, kind):
        n = int(np.prod(shape))
        where = {"seed": self.seed, "draw": self.draws[p], "stream": self.stream}
        return noise_numpy(n, kind=kind, **where).reshape(shape)


def quantize_twin(x, in_scale=None):
    """codes int8 and scale of each row of a tensor [R, ..., K]; in_scale goes along K."""
    x = x.float().numpy()
    axes = tuple(range(1, x.ndim))
    with np.errstate(all="ignore"):
        if in_scale is not None:
            x = x * in_scale.numpy()
        absmax = np.abs(x).max(axes, keepdims=True)
        codes = np.rint(x * (np.float32(127) / absmax)).clip(-127, 127)
        scale = absmax / np.float32(127)
    assert scale.dtype == np.float32
    finite = np.isfinite(absmax)
    small = finite & (absmax < 2.0**-100)
    codes = np.where(finite & ~small, codes, 0).astype(np.int8)
    scale = np.where(small, np.float32(0), np.where(finite, scale, np.float32("nan")))
    return torch.from_numpy(codes), torch.from_numpy(scale.reshape(-1))


def integer_twin(a, a_scale, weight, bias=None, residual=None, noise=None, out=torch.float32):
    """What the integer path makes of codes a [M, K] with a scale each: [M, N].

    Row m of M sees perturbation m * P // M.
    """
    a, a_scale = a.long().numpy().reshape(a.shape[0], weight.groups, -1), a_scale.numpy()
    parts = 1 if noise is None else len(noise.draws)
    pieces = [
        _piece(rows, row_scale, weight, noise, p)
        for p, (rows, row_scale) in enumerate(
            zip(np.split(a, parts), np.split(a_scale, parts), strict=True)
        )
    ]
    y = np.concatenate(pieces)
    with np.errstate(invalid="ignore"):
        if bias is not None:
            y = y + bias.float().numpy()
        if residual is not None:
            y = y + residual.float().numpy()
    assert y.dtype == np.float32
    return torch.from_numpy(y).to(out)


def _piece(a, a_scale, weight, noise, p):
    scale = weight.scale.view(weight.shape[0], -1).numpy()
    perturb = "none" if noise is None else noise.perturb
    c = None if noise is None else np.float32(noise.coeffs[p])
    if perturb == "scale":
        scale = scale + c * noise.z(p, scale.shape)
    elif perturb == "scale_relative":
        scale = scale * (np.float32(1) + c * noise.z(p, scale.shape))
    unit = 16 if perturb == "codes" and weight.bits == 4 else 1
    if perturb == "codes":
        scale = scale * np.float32(1 / unit)
    y = None
    for g in range(weight.groups):
        acc = a[:, g] @ weight.rows[:, g].T
        if perturb in ("weight", "codes"):
            other = a[:, g] @ noise.signs(p, weight.rows.shape)[:, g].T
        if perturb == "codes":
            acc = unit * acc + int(c) * other
        assert acc.dtype == np.int64 and np.abs(acc).max(initial=0) < 2**31
        total = acc.astype(np.float32)
        if perturb == "weight":
            total = total + c * other.astype(np.float32)
        term = total * scale[:, g]
        y = term if y is None else y + term
    with np.errstate(invalid="ignore"):
        return y * a_scale[:, None]


def patches(x, kernel=(1, 1), stride=1, padding=0, dilation=1):
    """[B, H', W', kh * kw * C] of [B, C, H, W], in the order of k."""
    (sh, sw), (ph, pw), (dh, dw) = (
        (v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)
    )
    x = F.pad(x, (pw, pw, ph, ph)).permute(0, 2, 3, 1)
    height = (x.shape[1] - dh * (kernel[0] - 1) - 1) // sh + 1
    width = (x.shape[2] - dw * (kernel[1] - 1) - 1) // sw + 1
    taps = [
        x[:, r * dh : r * dh + sh * height : sh, s * dw : s * dw + sw * width : sw]
        for r, s in product(range(kernel[0]), range(kernel[1]))
    ]
    return torch.cat(taps, -1)


def strided(x):
    """The same numbers, two elements apart."""
    return torch.stack([x, torch.full_like(x, 77)], -1)[..., 0]


def misaligned(x):
    """The same numbers, contiguous from an odd element on."""
    whole = torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])
    return whole[1:].view(x.shape)
