# SPDX-License-Identifier: Apache-2.0
"""No bit of an op depends on how many threads share it; sizes are such that several do."""

import pytest
import torch
from quantized_twins import Weight

from zo_kernels.ops import (
    geglu_quantize,
    group_norm,
    group_norm_quantize,
    layer_norm_quantize,
    qattention,
    qconv2d,
    qlinear,
    quantize_rows,
)


def _linear(bits, rows, act_bits, **perturb):
    weight = Weight((200, 320), bits, groups=5 if bits == 4 else 1, headroom=1)
    x = torch.randn(rows, 320)
    return lambda: qlinear(x, **weight.arguments, act_bits=act_bits, **perturb)


def _conv(kernel, size):
    weight = Weight((96, 64, kernel, kernel))
    x = torch.randn(2, 64, size, size).contiguous(memory_format=torch.channels_last)
    where = {"kernel_size": (kernel, kernel), "padding": kernel // 2}
    return lambda: qconv2d(x, **weight.arguments, act_bits=8, **where)


def _cases():
    torch.manual_seed(0)
    noise = {"seed": 1, "stream": 2, "draws": [3, 4], "coeffs": torch.tensor([1.0, -1.0])}
    tokens, picture, ones = torch.randn(3, 300, 128), torch.randn(3, 64, 16, 16), torch.ones(128)
    picture = picture.contiguous(memory_format=torch.channels_last)
    norm = {"groups": 32, "weight": ones[:64], "bias": ones[:64]}
    return {
        "qlinear": _linear(8, 400, 8),
        "qlinear-few-rows": _linear(8, 3, 8),
        "qlinear-int4": _linear(4, 400, 8),
        "qlinear-int4-few-rows": _linear(4, 3, 8),
        "qlinear-float": _linear(8, 100, 16),
        "qlinear-codes": _linear(8, 100, 8, perturb="codes", headroom=1, **noise),
        "qlinear-scale": _linear(8, 100, 8, perturb="scale_relative", **noise),
        "qconv2d-1x1": _conv(1, 24),
        "qconv2d-3x3": _conv(3, 24),
        "qconv2d-small": _conv(3, 3),
        "qattention": lambda: qattention(tokens, tokens, tokens, 4),
        "quantize_rows": lambda: quantize_rows(tokens),
        "geglu_quantize": lambda: geglu_quantize(tokens),
        "group_norm": lambda: group_norm(picture, **norm),
        "group_norm_quantize": lambda: group_norm_quantize(picture, **norm),
        "layer_norm_quantize": lambda: layer_norm_quantize(tokens, ones, ones),
    }


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_threads(name):
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            y = CASES[name]()
            results.append(y if isinstance(y, tuple) else (y,))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
