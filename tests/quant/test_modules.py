# SPDX-License-Identifier: Apache-2.0
import copy
import io
import json

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from zo_kernels.nn import QuantConv2d, QuantLinear, Spec
from zo_kernels.ops import qconv2d, qlinear
from zo_kernels.packing import pack
from zo_kernels.quant import absmax, dequantize

LAYERS = {
    "linear": (lambda: nn.Linear(64, 9), QuantLinear, (5, 64)),
    "linear without bias": (lambda: nn.Linear(64, 9, bias=False), QuantLinear, (2, 3, 64)),
    "linear odd": (lambda: nn.Linear(13, 9), QuantLinear, (5, 13)),
    "conv": (lambda: nn.Conv2d(32, 8, 3, padding=1), QuantConv2d, (2, 32, 9, 7)),
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
SPECS = ("w8", "w4", "w8-asym", "w8a8", "w4a8", "w4a8-asym")
GROUPED = ("w8-g32", "w4a8-g32", "w4-g32-asym")
CASES = [
    *((layer, spec) for layer in LAYERS for spec in SPECS),
    *((layer, spec) for layer in ("linear", "conv") for spec in GROUPED),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request):
    """(float layer, its quantized twin, an input)."""
    layer, spec = request.param
    make, kind, shape = LAYERS[layer]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source = make().requires_grad_(False)
        return source, kind.from_float(source, absmax, spec), torch.randn(shape)


def test_forward_is_close_to_the_float_layer_with_the_dequantized_weight(case):
    source, module, x = case
    twin = copy.deepcopy(source)
    twin.weight.copy_(dequantize(module))
    if module.spec.act_bits == 16:
        torch.testing.assert_close(module(x), twin(x))
    else:
        assert 20 * torch.log10(twin(x).norm() / (module(x) - twin(x)).norm()) > 38


def test_weight_is_close_and_the_source_untouched(case):
    source, module, x = case
    before = source(x)
    signal, noise = source.weight.norm(), (dequantize(module) - source.weight).norm()
    assert 20 * torch.log10(signal / noise) > (40 if module.spec.bits == 8 else 16)
    assert torch.equal(source(x), before)
    assert module.bias is source.bias
    assert module.training == source.training


def test_codes_are_those_of_the_rule_and_stored_packed_only(case):
    source, module, _ = case
    codes, scale, zero_point = absmax(source.weight, module.spec)
    assert torch.equal(module.codes(), codes) and module.codes().is_contiguous()
    assert torch.equal(module.qweight, pack(codes, module.spec.bits))
    assert torch.equal(module.scale, scale)
    assert (zero_point is None) == (module.zero_point is None)
    assert zero_point is None or torch.equal(module.zero_point, zero_point)
    assert sum(t.numel() for t in module.buffers() if t.dim() == 4) == module.qweight.numel()


def test_dequantize_follows_the_formula(case):
    _, module, _ = case
    codes, spec = module.codes(), module.spec
    for index in ((0, 0), (3, 1), (-1, -1)):
        where = (*index, *[0] * (codes.dim() - 2))
        channel = index[1] % codes.shape[1]
        group = (index[0], channel // spec.group) if spec.group else index[0]
        zero = 0 if module.zero_point is None else module.zero_point[group].int()
        assert dequantize(module)[where] == module.scale[group] * (codes[where].int() - zero)


def test_state_dict_round_trip(case):
    source, module, x = case
    state = module.state_dict()
    keys = {"qweight", "scale", "_extra_state"}
    keys |= {"bias"} if source.bias is not None else set()
    assert state.keys() == keys | ({"zero_point"} if module.spec.asymmetric else set())
    other = type(module).like(source, spec=module.spec)
    assert other.bias is None or not other.bias.requires_grad
    assert not other.codes().any() and (other.scale == 1).all()
    other.load_state_dict(load(save(state)))  # all of it is tensors
    assert torch.equal(other(x), module(x)) and other.headroom == module.headroom


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
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    dtype = {"half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16)
    getattr(module, cast)(*(() if cast in ("half", "double") else (dtype,)))
    for name, tensor in module.named_buffers():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
    assert module.weight.dtype == dtype
    assert module.bias is None or module.bias.dtype == dtype
    assert module(x.to(dtype)).dtype == dtype


def test_moves_to_the_meta_device_whole(case):
    _, module, _ = case
    module.to("meta")
    assert all(tensor.is_meta for tensor in module.buffers())
    assert module.weight.device.type == "meta"
    assert module.bias is None or module.bias.is_meta


def test_the_packed_weight_ignores_memory_formats():
    """It has four axes, so `.to(memory_format=torch.channels_last)` would shuffle its bytes."""
    for module in (
        QuantConv2d.from_float(nn.Conv2d(6, 20, 3), absmax),
        QuantLinear.from_float(nn.Linear(9, 70), absmax, "w4"),
    ):
        before = module.qweight.clone()
        for form in (torch.channels_last, torch.contiguous_format):
            module.to(memory_format=form)
            assert module.qweight.is_contiguous() and torch.equal(module.qweight, before)


def test_forward_is_the_op():
    linear = QuantLinear.from_float(nn.Linear(32, 4), absmax, "w4a8-g32-asym")
    x = torch.randn(3, 32)
    y = qlinear(
        *(x, linear.qweight, linear.scale, linear.zero_point, linear.bias), bits=4, act_bits=8
    )
    assert torch.equal(linear(x), y)
    conv = QuantConv2d.from_float(nn.Conv2d(6, 4, (3, 2), 2, 1), absmax, "w8a8")
    x = torch.randn(1, 6, 5, 5)
    y = qconv2d(x, conv.qweight, conv.scale, None, conv.bias, (3, 2), 2, 1, act_bits=8)
    assert torch.equal(conv(x), y)


def test_what_a_module_holds_may_become_a_parameter():
    linear = QuantLinear.from_float(nn.Linear(32, 4), absmax, "w8a8")
    x = torch.randn(3, 32)
    y = linear(x)
    linear.scale = nn.Parameter(linear.scale.clone())
    assert "scale" not in dict(linear.named_buffers())
    assert torch.equal(linear(x), y)
    linear(x).sum().backward()
    assert linear.scale.grad is not None


def test_repr_names_shape_and_spec():
    assert repr(QuantLinear(6, 4, bias=False)) == (
        "QuantLinear(in_features=6, out_features=4, bias=False, spec=w8)"
    )
    assert repr(QuantConv2d(32, 4, 3, padding=1, spec="w4a8-g32")) == (
        "QuantConv2d(32, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), "
        "groups=1, bias=True, spec=w4a8-g32)"
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
    with pytest.raises(AttributeError, match=r"got weight.norm; use .codes\(\) and .scale"):
        weight.norm()


@pytest.mark.parametrize("spec", ["w8", "w8a8"])
def test_compiles_without_breaks(spec):
    model = nn.Sequential(
        QuantConv2d.from_float(nn.Conv2d(3, 4, 3), absmax, spec),
        nn.Flatten(),
        QuantLinear.from_float(nn.Linear(36, 5), absmax, spec),
    )
    x = torch.ones(2, 3, 5, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("spec", "codes", "headroom"),
    [
        ("w8", [-100, 124], 3),
        ("w8", [-127, 0], 0),
        ("w8", [-128, 0], 0),
        ("w8", [0, 0], 127),
        ("w8-asym", [0, 0], 0),
        ("w4", [-7, 7], 15),
        ("w4", [-8, 0], 0),
        ("w4-asym", [0, 1], 0),
    ],
)
def test_headroom_is_what_the_codes_leave(spec, codes, headroom):
    module = QuantLinear(2, 1, spec=spec)
    zero_point = torch.zeros(1, dtype=torch.int8) if module.spec.asymmetric else None
    module.set_codes(torch.tensor([codes], dtype=torch.int8), torch.ones(1), zero_point)
    assert module.headroom == headroom
    other = QuantLinear(2, 1, spec=spec)
    other.load_state_dict(module.state_dict())
    assert other.headroom == headroom


def nan_in(layer):
    with torch.no_grad():
        layer.weight.view(-1)[0] = float("nan")
    return layer


@pytest.mark.parametrize(
    ("kind", "source", "spec", "text"),
    [
        (QuantLinear, lambda: nan_in(nn.Linear(3, 2)), "w8", "weight must be finite, got 1 values"),
        (QuantLinear, lambda: nn.Linear(3, 2, device="meta"), "w8", "weight must have values, got"),
        (QuantLinear, lambda: QuantLinear(3, 2), "w8", "weight must be a floating tensor, got Wei"),
        (
            QuantConv2d,
            lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"),
            "w8",
            "source must be a convolution that qconv2d computes, got one whose padding_mode is 're",
        ),
        (
            QuantConv2d,
            lambda: nn.Conv2d(3, 2, 2, padding="same"),
            "w8",
            "got one whose padding 'same' is not symmetric",
        ),
        (QuantLinear, lambda: nn.Linear(3, 2), "w2", "QuantLinear.from_float: spec must be w8, w4"),
        (
            QuantConv2d,
            lambda: nn.Conv2d(8, 2, 4),
            "w4-g32",
            "QuantConv2d: spec must fit the weight, got w4-g32 for one of which groups of 32 do",
        ),
    ],
)
def test_from_float_refuses(kind, source, spec, text):
    with pytest.raises((ValueError, TypeError), match=text):
        kind.from_float(source(), absmax, spec)


def test_conv_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="QuantConv2d: groups must divide in_channels"):
        QuantConv2d(6, 8, 3, groups=4)


ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("spec", "codes", "scale", "zero_point", "kind", "text"),
    [
        ("w8", torch.zeros(4, 6), ONES, None, TypeError, "codes must be torch.int8, got torch.flo"),
        ("w8", (4, 5), ONES, None, ValueError, r"codes must be \[4, 6\] for w8 and a weight of \["),
        ("w8", (4, 6), ONES.double(), None, TypeError, "scale must be torch.float32"),
        ("w8", (4, 6), torch.ones(4, 1), None, ValueError, r"scale must be \[4\] .* got \[4, 1\]"),
        (
            "w8",
            (4, 6),
            ONES / 0,
            None,
            ValueError,
            "scale must be finite, got 4 values that are NaN",
        ),
        ("w8", (4, 6), ONES, ONES.char(), ValueError, "zero_point must be None for w8, got one"),
        (
            "w8-asym",
            (4, 6),
            ONES,
            None,
            ValueError,
            "zero_point must be given for w8-asym, got None",
        ),
        ("w8-asym", (4, 6), ONES, ONES, TypeError, "zero_point must be torch.int8"),
        (
            "w4",
            torch.full((4, 6), 8).char(),
            ONES,
            None,
            ValueError,
            "codes must be -8 to 7 with 4",
        ),
    ],
)
def test_set_codes_refuses(spec, codes, scale, zero_point, kind, text):
    module = QuantLinear(6, 4, spec=spec)
    before = module.state_dict()
    codes = torch.zeros(codes, dtype=torch.int8) if isinstance(codes, tuple) else codes
    with pytest.raises(kind, match=text):
        module.set_codes(codes, scale, zero_point)
    assert all(torch.equal(module.state_dict()[key], before[key]) for key in before)


def altered(state, **changes):
    """The state with some entries replaced; None removes one."""
    return {k: v for k, v in {**state, **changes}.items() if v is not None}


def extra(**changes):
    fields = {"packing": 1, "spec": "w8", "headroom": 0} | changes
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"_extra_state": extra(packing=2)},
            "_extra_state must tell packing 1, got 2; state dicts",
        ),
        ({"_extra_state": extra(spec="w4")}, "_extra_state must tell spec w8, got w4; state dicts"),
        ({"_extra_state": None}, "_extra_state must tell packing 1, got none"),
        # What version 0.1 stored.
        (
            {"_extra_state": None, "qweight": torch.zeros(4, 6, dtype=torch.int8)},
            "_extra_state must tell packing 1, got none",
        ),
        (
            {"qweight": torch.zeros(1, 2, 16, 4, dtype=torch.int8)},
            "qweight must be torch.uint8, got torch.int8; it is the state of another kind",
        ),
        ({"scale": torch.ones(4).double()}, "scale must be torch.float32, got torch.float64"),
        ({"scale": torch.tensor([1, 2, float("nan"), 4])}, "0.scale must be finite, got 1 values"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_states_that_do_not_fit_are_refused(changes, text, strict, assign):
    model = nn.Sequential(QuantLinear(6, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    changes = {f"0.{key}": value for key, value in changes.items()}
    state = altered(nn.Sequential(QuantLinear(6, 4)).state_dict(), **changes)
    with pytest.raises(ValueError, match=rf"load_state_dict: 0\.?{text.removeprefix('0')}"):
        model.load_state_dict(state, strict=strict, assign=assign)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_state_of_another_shape_is_refused_by_torch():
    state = QuantLinear(6, 40).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for qweight"):
        QuantLinear(6, 4).load_state_dict(state)


def test_a_state_without_this_layer_is_left_to_torch():
    module = QuantLinear(6, 4)
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})
    assert module.load_state_dict({"bias": torch.ones(4)}, strict=False).missing_keys
    assert (module.bias == 1).all()


def test_like_keeps_the_spec():
    module = QuantLinear(64, 4, spec="w4a8-g32-asym")
    assert QuantLinear.like(module).spec == Spec(4, 8, 32, True)
    assert QuantLinear.like(module, spec="w8").spec == Spec()
