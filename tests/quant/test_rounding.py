# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from zo_kernels.quant import absmax


@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (127, 1000), (8, 3, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_absmax_is_within_half_a_step_and_uses_the_whole_range(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scale = absmax(weight)
    assert codes.shape == weight.shape and codes.dtype == torch.int8
    assert scale.shape == shape[:1] and scale.dtype == torch.float32
    assert (codes.flatten(1).abs().amax(1) == 127).all()
    step = scale.double().view(-1, *[1] * (len(shape) - 1))
    assert ((codes * step - weight.double()).abs() <= step * 0.50001).all()


def test_absmax_follows_the_rule():
    codes, scale = absmax(torch.tensor([[-12.7, 0.25, 0.15, 6.0]]))
    assert scale.item() == pytest.approx(0.1)
    assert codes.tolist() == [[-127, 2, 2, 60]]  # 2.5 goes to the even 2, 1.5 to the even 2


@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-38])
def test_channels_of_almost_nothing_stay_finite(value):
    weight = torch.tensor([[value, -value], [1.0, 2.0]])
    codes, scale = absmax(weight)
    assert scale.isfinite().all() and (scale > 0).all()
    torch.testing.assert_close(codes[0] * scale[0], weight[0], rtol=0, atol=1e-38)


def test_weight_is_unchanged_and_its_memory_format_kept():
    weight = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    weight = weight.to(memory_format=torch.channels_last)
    before = weight.clone()
    codes, _ = absmax(weight)
    assert torch.equal(weight, before)
    assert codes.is_contiguous(memory_format=torch.channels_last)
