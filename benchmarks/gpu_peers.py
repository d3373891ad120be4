# SPDX-License-Identifier: Apache-2.0
"""Other libraries' linear layers on a GPU, each where it is installed.

A row is timed only where its result is near that of the bf16 layer that it was made of.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_table import Candidate, Missing

FARTHEST = 0.3  # relative error in the 2-norm: 4 bits of random weights are about 0.1 off
GROUP = 64


@dataclass(frozen=True)
class Peer:
    """A layer of another library.

    Attributes:
        bits: of a weight.
        peak: what its products are limited by, a key of the peaks.
        make: replaces a bf16 layer on the device; raises ImportError where it is not installed.
    """

    name: str
    bits: int
    peak: str
    make: Callable[[nn.Linear], Callable[[Tensor], Tensor]]


def _compiled(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    on_gpu = layer.weight.is_cuda
    compiled: Any = torch.compile(layer, backend="inductor" if on_gpu else "eager", dynamic=False)
    return compiled


def _torchao(layer: nn.Linear, config: str, **options: Any) -> Callable[[Tensor], Tensor]:
    from torchao import quantization

    model = nn.Sequential(layer)
    quantization.quantize_(model, getattr(quantization, config)(**options))
    compiled: Any = torch.compile(model, dynamic=False)  # as its documentation runs it
    return compiled


def _quanto(layer: nn.Linear, weights: str) -> Callable[[Tensor], Tensor]:
    from optimum import quanto

    model = nn.Sequential(layer)
    quanto.quantize(model, weights=getattr(quanto, weights))
    quanto.freeze(model)
    return model


def _bitsandbytes(layer: nn.Linear, kind: str, **options: Any) -> Callable[[Tensor], Tensor]:
    from bitsandbytes import nn as layers

    made = getattr(layers, kind)(layer.in_features, layer.out_features, True, **options)
    made.load_state_dict({k: v.cpu() for k, v in layer.state_dict().items()})
    return made.to(layer.weight.device)  # which rounds the weight


def _gemlite(layer: nn.Linear, kind: str) -> Callable[[Tensor], Tensor]:
    from gemlite import helper

    return getattr(helper, kind)(device=layer.weight.device, dtype=torch.bfloat16).from_linear(
        layer
    )


PEERS = (
    Peer("torch bf16 compiled", 16, "bf16", _compiled),
    Peer(
        "torchao int8 dynamic, compiled",
        8,
        "int8",
        lambda layer: _torchao(layer, "Int8DynamicActivationInt8WeightConfig"),
    ),
    Peer(
        "torchao int4 weight only, compiled",
        4,
        "bf16",
        lambda layer: _torchao(layer, "Int4WeightOnlyConfig", group_size=GROUP),
    ),
    Peer("optimum-quanto qint8", 8, "bf16", lambda layer: _quanto(layer, "qint8")),
    Peer("optimum-quanto qint4", 4, "bf16", lambda layer: _quanto(layer, "qint4")),
    Peer(
        "bitsandbytes LLM.int8",
        8,
        "int8",
        lambda layer: _bitsandbytes(layer, "Linear8bitLt", has_fp16_weights=False),
    ),
    Peer(
        "bitsandbytes nf4",
        4,
        "bf16",
        lambda layer: _bitsandbytes(layer, "Linear4bit", compute_dtype=torch.bfloat16),
    ),
    Peer("gemlite int8 dynamic", 8, "int8", lambda layer: _gemlite(layer, "A8W8_dynamic")),
    Peer("gemlite int8 weight only", 8, "bf16", lambda layer: _gemlite(layer, "A16W8")),
)


def candidate(
    peer: Peer, weight: Tensor, bias: Tensor, x: Tensor, work: float, peak: str
) -> Candidate | Missing:
    """Its row for a bf16 weight [N, K], bias [N] and x [M, K] on a device."""
    layer = nn.Linear(*weight.shape[::-1], device=weight.device, dtype=weight.dtype)
    layer.requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    expected = layer(x).float()
    try:
        run = peer.make(layer)
        with torch.no_grad():
            error = float((run(x).float() - expected).norm() / expected.norm())
    except ImportError as why:
        return Missing(peer.name, f"not installed ({why.name})")
    except Exception as why:  # a library that the machine or the shape does not suit: of any kind
        return Missing(peer.name, f"fails: {str(why).strip().splitlines()[0][:120]}")
    if not error <= FARTHEST:
        return Missing(peer.name, f"is wrong: relative error {error:.2f}")

    def call() -> Tensor:
        with torch.no_grad():
            return run(x)

    return Candidate(peer.name, call, work, peak)
