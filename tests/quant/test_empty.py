# SPDX-License-Identifier: Apache-2.0
"""`quantize_empty_`: the modules that `quantize_` makes, without values."""

import pytest
import torch
from torch import nn

from zo_kernels.quant import QuantConfig, quantize_, quantize_empty_


def model():
    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.SiLU(), nn.Linear(64, 32), nn.Linear(32, 10))


@pytest.mark.parametrize("spec", ["w8", "w8a8", "w4a8-g32", "w4-g64-asym"])
def test_the_shapes_of_the_quantized_model(spec):
    config = QuantConfig(spec, fallback="w8")
    real, empty = model(), model().to("meta")
    report, told = quantize_(real, config), quantize_empty_(empty, config)
    assert told == report  # bytes before and after among them
    assert [type(m) for m in empty.modules()] == [type(m) for m in real.modules()]
    mine, other = dict(empty.named_buffers()), dict(real.named_buffers())
    assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {
        k: (v.shape, v.dtype) for k, v in other.items()
    }
    assert all(t.is_meta for t in (*mine.values(), *empty.parameters()))


def test_a_layer_under_two_names_stays_one():
    empty = model().to("meta")
    empty.again = empty[2]
    quantize_empty_(empty)
    assert empty.again is empty[2] and empty[2].qweight.is_meta


def test_weights_that_would_be_lost_are_refused():
    kept = model()
    before = kept[0].weight
    with pytest.raises(ValueError, match=r"quantize_empty_: 0\.weight must be on the meta device"):
        quantize_empty_(kept)
    assert kept[0].weight is before and type(kept[2]) is nn.Linear
    x = torch.randn(1, 4, 5, 5)
    assert kept[0](x).shape == (1, 16, 3, 3)
