# SPDX-License-Identifier: Apache-2.0
"""`qlinear` and `qconv2d` on a GPU, for `benchmarks.gpu_ops`: ours, torch's and other libraries'.

A row of ours is refused unless its result has the bits of the reference. Few floating rows go by
CUDA C++ too where it was built, and are refused unless the result is Triton's, but for rounding.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_peers
from benchmarks.gpu_table import BASELINE, Candidate, Missing, by_cpp
from benchmarks.integer_candidates import Ours, which_backend
from zo_kernels import _native
from zo_kernels._registry import use_backend
from zo_kernels.ops import quantize_rows
from zo_kernels.testing import assert_same_bits

CHECKED = 64  # rows whose bits are compared: the reference multiplies in fp64
# Where they come from, M, N, K.
LINEAR = (
    ("square", 8192, 8192, 8192),
    ("SD1.5, attention", 4096, 320, 320),
    ("SDXL, attention", 4096, 1280, 1280),
    ("SDXL, feed forward in", 4096, 10240, 1280),
    ("SDXL, feed forward out", 4096, 1280, 5120),
    ("Flux, attention", 4096, 3072, 3072),
    ("Flux, feed forward in", 4096, 12288, 3072),
    ("Flux, feed forward out", 4096, 3072, 12288),
)
SMALL = ((1, 4096, 4096), (4, 4096, 4096), (16, 4096, 4096), (1, 12288, 3072), (16, 12288, 3072))
# Of these, other libraries too.
PEERED = ((4096, 1280, 1280), (4096, 12288, 3072), (1, 4096, 4096), (16, 12288, 3072))
# Pictures, channels, output channels, pixels, kernel.
CONV = (
    ("SD1.5", 2, 320, 320, 64, 3),
    ("SD1.5", 2, 640, 640, 32, 3),
    ("SD1.5", 2, 1280, 1280, 16, 3),
    ("SDXL", 2, 320, 320, 128, 3),
    ("SDXL", 2, 640, 640, 64, 3),
    ("SDXL", 2, 1280, 1280, 32, 3),
    ("SDXL", 2, 1920, 640, 64, 1),
)


def _bf16_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    return lambda: F.linear(x, weight, bias)


def linear(
    m: int, n: int, k: int, device: str, small: bool = False, peers: bool = False
) -> Iterator[Candidate | Missing]:
    """Rows of one product, from bf16 to bf16; few rows are limited by the bytes of the weight.

    peers: whether other libraries have rows; compiling them takes a while.
    """
    x = torch.randn(m, k, device=device).bfloat16()
    weight, bias = torch.randn(n, k, device=device) / k**0.5, torch.randn(n, device=device)
    layer = Ours("qlinear", weight, bias.bfloat16())
    operations = 2.0 * m * n * k
    formats: list[tuple[str, str, dict[str, Any]]] = [
        ("w8a8", "w8a8", {}),
        ("w4a8-g64", "w4a8-g64", {}),
        ("w8a16", "w8a8", {"act_bits": 16}),
        ("w4a16-g64", "w4a8-g64", {"act_bits": 16}),
    ]
    formats.append(("w8a8, codes +1", "w8a8", _codes(1)))
    for name, stored, more in formats:
        call, few = layer.call(stored, x, **more), layer.call(stored, x[:CHECKED], **more)
        if more.get("act_bits") != 16:
            with use_backend("reference"):
                wanted = few()
            assert_same_bits(call()[: len(wanted)], wanted)
        bits = 8 if stored == "w8a8" else 4
        peak = "int8" if more.get("act_bits") != 16 else "bf16"
        work, peak = (n * k * bits / 8, "copy") if small else (operations, peak)
        yield Candidate(name, call, work, peak, which_backend("qlinear", call))
        if small and more.get("act_bits") == 16 and x.is_cuda and _native.load_cuda() is None:
            torch.testing.assert_close(by_cpp(call)(), call())
            yield Candidate(name, by_cpp(call), work, peak, "cuda c++")
    half = _bf16_linear(x, weight.bfloat16(), bias.bfloat16())
    yield Candidate(BASELINE, half, 2.0 * n * k if small else operations, _peak(small, "bf16"))
    if m > 16:  # what torch._int_mm takes
        codes, _ = quantize_rows(x)
        other = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        yield Candidate("torch._int_mm alone", _int_mm(codes, other), operations, "int8")

    torch.compiler.reset()  # or one shape too many is run without being compiled
    for peer in gpu_peers.PEERS if peers else ():
        work, peak = (n * k * peer.bits / 8, "copy") if small else (operations, peer.peak)
        yield gpu_peers.candidate(peer, weight.bfloat16(), bias.bfloat16(), x, work, peak)


def _int_mm(a: Tensor, b: Tensor) -> Callable[[], object]:
    return lambda: torch._int_mm(a, b.T)


def _peak(small: bool, otherwise: str) -> str:
    return "copy" if small else otherwise


def _codes(count: int) -> dict[str, Any]:
    noise = {"perturb": "codes", "seed": 1, "stream": 1, "headroom": 1}
    return noise | {"draws": list(range(count)), "coeffs": torch.ones(count)}


def conv(
    batch: int, c: int, n: int, size: int, kernel: int, device: str
) -> Iterator[Candidate]:  # fmt: skip
    x = torch.randn(batch, c, size, size, device=device).bfloat16()
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(n, c, kernel, kernel, device=device) / (c * kernel**2) ** 0.5
    bias = torch.randn(n, device=device).bfloat16()
    where = {"kernel_size": kernel, "padding": kernel // 2}
    layer = Ours("qconv2d", weight, bias, **where)
    work = 2.0 * batch * size**2 * n * c * kernel**2
    codes, x_scale = quantize_rows(x, per_sample=True)
    given = {"x_scale": x_scale, "out_dtype": torch.bfloat16}
    for name, stored, a, more in (
        ("w8a8", "w8a8", x, {}),
        ("w8a8, product alone", "w8a8", codes, given),
        ("w4a8-g64", "w4a8-g64", x, {}),
        ("w8a8, codes +1", "w8a8", x, _codes(1)),
    ):
        if stored not in layer.formats():
            continue
        call = layer.call(stored, a, **more)
        first = more | ({"x_scale": x_scale[:1]} if a is codes else {})
        with use_backend("reference"):
            wanted = layer.call(stored, a[:1], **first)()
        assert_same_bits(call()[:1].contiguous(), wanted.contiguous())
        yield Candidate(name, call, work, "int8", which_backend("qconv2d", call))
    half = weight.bfloat16().to(memory_format=torch.channels_last)
    yield Candidate(BASELINE, _bf16_conv(x, half, bias, kernel), work, "bf16")


def _bf16_conv(x: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> Callable[[], object]:
    return lambda: F.conv2d(x, weight, bias, padding=kernel // 2)
