# SPDX-License-Identifier: Apache-2.0
import copy
import io

import pytest
import torch
from torch import nn

from zo_kernels.nn import QuantConv2d, QuantLinear
from zo_kernels.ops import qconv2d, qlinear
from zo_kernels.quant import absmax, dequantize

CASES = {
    "linear": (lambda: nn.Linear(14, 9), QuantLinear, (5, 14)),
    "linear without bias": (lambda: nn.Linear(14, 9, bias=False), QuantLinear, (2, 3, 14)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), QuantConv2d, (2, 6, 9, 7)),
    "conv without bias": (lambda: nn.Conv2d(6, 8, 1, bias=False), QuantConv2d, (2, 6, 9, 7)),
    "conv strided": (
        lambda: nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 2), groups=2),
        QuantConv2d,
        (2, 6, 9, 7),
    ),
    "conv same": (
        lambda: nn.Conv2d(6, 8, (3, 5), padding="same", dilation=2),
        QuantConv2d,
        (2, 6, 9, 7),
    ),
    "conv valid": (lambda: nn.Conv2d(6, 8, 3, padding="valid"), QuantConv2d, (2, 6, 9, 7)),
}


@pytest.fixture(params=CASES)
def case(request):
    """(float layer, its quantized twin, an input)."""
    make, kind, shape = CASES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source = make().requires_grad_(False)
        return source, kind.from_float(source, absmax), torch.randn(shape)


def test_forward_equals_the_float_layer_with_the_dequantized_weight(case):
    source, module, x = case
    twin = copy.deepcopy(source)
    twin.weight.copy_(dequantize(module))
    torch.testing.assert_close(module(x), twin(x))


def test_weight_is_close_and_the_source_untouched(case):
    source, module, x = case
    before = source(x)
    signal, noise = source.weight.norm(), (dequantize(module) - source.weight).norm()
    assert 20 * torch.log10(signal / noise) > 40
    assert torch.equal(source(x), before)
    assert module.bias is source.bias
    assert module.training == source.training


def test_state_dict_round_trip(case):
    source, module, x = case
    state = module.state_dict()
    assert state.keys() == {"qweight", "scale"} | ({"bias"} if source.bias is not None else set())
    other = type(module).like(source)
    assert other.bias is None or not other.bias.requires_grad
    assert not other.qweight.any() and (other.scale == 1).all()
    other.load_state_dict(state)
    assert torch.equal(other(x), module(x))


def test_deepcopy_and_pickle(case):
    _, module, x = case
    twin = copy.deepcopy(module)
    assert twin.qweight.data_ptr() != module.qweight.data_ptr()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded):
        assert torch.equal(other(x), module(x))
        assert other.weight.dtype == module.weight.dtype


@pytest.mark.parametrize("cast", ["to", "half", "double", "type"])
def test_casts_never_touch_integers_and_scale(case, cast):
    _, module, x = case
    codes, scale = module.qweight.clone(), module.scale.clone()
    dtype = {"half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16)
    getattr(module, cast)(*(() if cast in ("half", "double") else (dtype,)))
    assert torch.equal(module.qweight, codes) and module.qweight.dtype == torch.int8
    assert torch.equal(module.scale, scale) and module.scale.dtype == torch.float32
    assert module.weight.dtype == dtype
    assert module.bias is None or module.bias.dtype == dtype
    assert module(x.to(dtype)).dtype == dtype


def test_moves_to_the_meta_device_whole(case):
    _, module, _ = case
    module.to("meta")
    assert module.qweight.is_meta and module.scale.is_meta and module.weight.device.type == "meta"
    assert module.bias is None or module.bias.is_meta


def test_conv_is_channels_last_until_told_otherwise():
    module = QuantConv2d.from_float(nn.Conv2d(6, 8, 3), absmax)
    x = torch.ones(2, 6, 9, 7)
    assert module.qweight.is_contiguous(memory_format=torch.channels_last)
    assert module(x).is_contiguous(memory_format=torch.channels_last)
    module.to(memory_format=torch.contiguous_format)
    assert module.qweight.is_contiguous() and module(x).is_contiguous()
    module.to(memory_format=torch.channels_last)
    assert module.qweight.is_contiguous(memory_format=torch.channels_last)


def test_forward_is_the_op():
    linear = QuantLinear.from_float(nn.Linear(6, 4), absmax)
    x = torch.ones(3, 6)
    assert torch.equal(linear(x), qlinear(x, linear.qweight, linear.scale, None, linear.bias))
    conv = QuantConv2d.from_float(nn.Conv2d(6, 4, 3, 2, 1), absmax)
    x = torch.ones(1, 6, 5, 5)
    y = qconv2d(x, conv.qweight, conv.scale, None, conv.bias, 2, 1)
    assert torch.equal(conv(x), y)


def test_repr_names_shape_and_spec():
    assert repr(QuantLinear(6, 4, bias=False)) == (
        "QuantLinear(in_features=6, out_features=4, bias=False, spec=w8)"
    )
    assert repr(QuantConv2d(6, 4, 3, padding=1)) == (
        "QuantConv2d(6, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), "
        "groups=1, bias=True, spec=w8)"
    )


def test_weight_describes_and_refuses_to_be_a_tensor():
    weight = QuantLinear(6, 4, dtype=torch.bfloat16).weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((4, 6), torch.bfloat16, "cpu")
    assert (weight.ndim, weight.dim(), weight.numel(), weight.size(0)) == (2, 2, 24, 4)
    assert weight.data.dtype == torch.bfloat16 and weight.is_floating_point()
    assert weight.size() == (4, 6) and not isinstance(weight, torch.Tensor)
    assert "shape=(4, 6), dtype=torch.bfloat16" in repr(weight)
    for use in (
        lambda: torch.cat([weight, weight]),
        lambda: nn.functional.linear(torch.ones(1, 6), weight),
    ):
        with pytest.raises(TypeError, match="weight must be read for shape, dtype and device only"):
            use()
    with pytest.raises(AttributeError, match=r"got weight.norm; use .qweight and .scale"):
        weight.norm()


def test_compiles_without_breaks():
    model = nn.Sequential(
        QuantConv2d.from_float(nn.Conv2d(3, 4, 3), absmax),
        nn.Flatten(),
        QuantLinear.from_float(nn.Linear(36, 5), absmax),
    )
    x = torch.ones(2, 3, 5, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def nan_in(layer):
    with torch.no_grad():
        layer.weight.view(-1)[0] = float("nan")
    return layer


@pytest.mark.parametrize(
    ("kind", "source", "text"),
    [
        (QuantLinear, lambda: nan_in(nn.Linear(3, 2)), "weight must be finite, got 1 values"),
        (QuantLinear, lambda: nn.Linear(3, 2, device="meta"), "weight must have values, got a"),
        (
            QuantLinear,
            lambda: QuantLinear(3, 2),
            "weight must be a floating tensor, got WeightInfo",
        ),
        (
            QuantConv2d,
            lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"),
            "source must be a convolution that qconv2d computes, got one whose padding_mode is 're",
        ),
        (
            QuantConv2d,
            lambda: nn.Conv2d(3, 2, 2, padding="same"),
            "got one whose padding 'same' is not symmetric",
        ),
    ],
)
def test_from_float_refuses(kind, source, text):
    with pytest.raises((ValueError, TypeError), match=text):
        kind.from_float(source(), absmax)


def test_conv_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="QuantConv2d: groups must divide in_channels"):
        QuantConv2d(6, 8, 3, groups=4)
