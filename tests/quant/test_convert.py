# SPDX-License-Identifier: Apache-2.0
import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from zo_kernels.nn import QuantConv2d, QuantLinear
from zo_kernels.quant import QuantConfig, absmax, dequantize, mse, quantize_
from zo_kernels.quant.rounding import ROUNDINGS


class Block(nn.Module):
    """One of everything that `quantize_` meets."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 6)
        self.convs = nn.Sequential(nn.Conv2d(6, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 3))
        self.last = nn.Linear(4, 3, bias=False)

    def forward(self, ids):
        x = self.first(self.norm(self.embedding(ids)))  # [B, T, 6]
        x = self.convs(x.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 3))
        return self.last(x.mean((2, 3)))


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Block().eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_replaces_linear_and_conv_and_nothing_else(model):
    before = state(model)
    report = quantize_(model)
    assert report.quantized == dict.fromkeys(("first", "convs.0", "convs.2", "last"), "w8")
    assert report.skipped == {}
    assert type(model.first) is QuantLinear and type(model.convs[2]) is QuantConv2d
    after = model.state_dict()
    for name in before.keys() & after.keys():  # embedding, norms, biases
        assert torch.equal(before[name], after[name])
    assert after.keys() - before.keys() == {
        f"{name}.{key}" for name in report.quantized for key in ("qweight", "scale", "_extra_state")
    }
    codes, scale, _ = absmax(before["convs.2.weight"])
    assert torch.equal(model.convs[2].codes(), codes) and torch.equal(model.convs[2].scale, scale)
    assert not model.first.training


def test_output_is_close_to_that_of_the_float_model(model):
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        before = model(ids)
        quantize_(model)
        assert 20 * torch.log10(before.norm() / (model(ids) - before).norm()) > 30


def test_report_counts_bytes_and_prints(model):
    def size():
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    before = size()
    report = quantize_(model, QuantConfig(skip=("last",)))
    assert (report.bytes_before, report.bytes_after) == (before, size())
    assert str(report) == (
        "3 layers quantized, 1 skipped, 0.0 MB -> 0.0 MB\n  last: skipped by pattern"
    )


def test_each_float_weight_is_gone_before_the_next_layer_is_rounded(model, monkeypatch):
    weights = {n: weakref.ref(model.get_submodule(n).weight) for n in ("first", "convs.0", "last")}
    alive = []

    def watching(*args):
        gc.collect()
        alive.append([name for name, ref in weights.items() if ref() is not None])
        return absmax(*args)

    monkeypatch.setitem(ROUNDINGS, "absmax", watching)
    quantize_(model)
    assert alive == [["first", "convs.0", "last"], ["convs.0", "last"], ["last"], ["last"]]
    gc.collect()
    assert all(ref() is None for ref in weights.values())


def test_skip_patterns_and_overrides(model):
    overrides = {"f*": "w4a8", "first": "w8-asym"}
    report = quantize_(model, QuantConfig("w8a8", skip=("convs.*",), overrides=overrides))
    assert report.skipped == dict.fromkeys(("convs.0", "convs.2"), "skipped by pattern")
    assert type(model.convs[0]) is nn.Conv2d
    assert report.quantized == {"first": "w4a8", "last": "w8a8"}
    assert (model.first.spec.bits, model.first.spec.act_bits) == (4, 8)
    assert model.first.codes().abs().max() <= 7


def test_rounding_and_headroom_reach_the_layers(model):
    weight = model.first.weight.detach().clone()
    quantize_(model, QuantConfig(rounding="mse", headroom=3, overrides={"last": "w4"}))
    expected = mse(weight, "w8", 3)
    assert torch.equal(model.first.codes(), expected.codes)
    assert torch.equal(model.first.scale, expected.scale)
    assert model.first.headroom >= 3 and model.last.headroom == 15


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 64, 3)
        self.mid = nn.Linear(64, 64)
        self.odd = nn.Linear(80, 3)


def test_a_spec_that_does_not_fit_names_the_layers_and_the_ways_out():
    model = Wide()
    before = state(model)
    with pytest.raises(
        ValueError, match=r"quantize_: spec must fit every layer, got 2 .*first: gr"
    ):
        quantize_(model, QuantConfig("w4a8-g64"))
    with pytest.raises(ValueError, match=r"got 1 .*odd: groups of 64 do not divide its 80 input"):
        quantize_(model, QuantConfig("w4a8-g64", skip=("first",)))
    with pytest.raises(ValueError, match=r"got 1 .*odd: groups of 32 do not divide its 80 input"):
        quantize_(model, QuantConfig("w4a8-g64", skip=("first",), fallback="w8-g32"))
    assert same(state(model), before)


def test_fallback_and_overrides_serve_layers_that_a_spec_does_not_fit():
    model = Wide()
    report = quantize_(model, QuantConfig("w4a8-g64", overrides={"odd": "w8a8"}, fallback="w8"))
    assert report.quantized == {"first": "w8", "mid": "w4a8-g64", "odd": "w8a8"}
    assert model.mid.scale.shape == (64, 1)


def test_a_row_too_long_for_int32_sums_is_refused():
    model = nn.Sequential(nn.Linear(65537, 1, bias=False))
    with pytest.raises(ValueError, match=r"0: a row of 65537 integers is longer than 65536"):
        quantize_(model, QuantConfig("w8a8"))
    assert quantize_(model, QuantConfig("w8")).quantized == {"0": "w8"}


@pytest.mark.parametrize("field", ["skip", "overrides"])
def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing(model, field):
    before = state(model)
    value = ("conv_in",) if field == "skip" else {"conv_in": "w8"}
    with pytest.raises(
        ValueError, match=r"quantize_: pattern must match .* got 'conv_in', which m"
    ):
        quantize_(model, QuantConfig(**{field: value}))
    assert same(state(model), before)


def test_what_cannot_be_quantized_is_skipped_with_its_reason(model):
    class MyLinear(nn.Linear):
        pass

    model.sub = MyLinear(6, 6)
    model.transposed = nn.ConvTranspose2d(4, 4, 3)
    model.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    model.head = nn.Linear(6, 10, bias=False)
    model.head.weight = model.embedding.weight
    report = quantize_(model)
    assert report.skipped == {
        "sub": "no integer module for MyLinear",
        "transposed": "no integer module for ConvTranspose2d",
        "reflect": "padding_mode is 'reflect'",
        "head": "its weight is shared with embedding",
    }
    assert model.head.weight is model.embedding.weight


def test_attention_projections_of_torch_are_left_alone():
    """`nn.MultiheadAttention` hands `out_proj.weight` to a fused function."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    report = quantize_(model)
    assert list(report.skipped) == ["attention.out_proj"]
    x = torch.ones(3, 2, 8)
    assert model["attention"](x, x, x)[0].isfinite().all()


def test_a_module_under_two_names_stays_one_module(model):
    model.again = model.first
    report = quantize_(model)
    assert model.again is model.first and type(model.again) is QuantLinear
    assert "again" not in report.quantized


def test_quantizing_again_continues_and_then_refuses(model):
    quantize_(model, QuantConfig(skip=("last",)))
    codes = model.first.qweight.clone()
    report = quantize_(model)
    assert report.quantized == {"last": "w8"}
    assert report.skipped["first"] == "quantized already (w8)"
    assert torch.equal(model.first.qweight, codes)
    with pytest.raises(ValueError, match=r"got 4 layers that cannot .* \(quantized already \(w8\)"):
        quantize_(model)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (nn.Sequential(nn.ReLU()), "quantize_: model must contain .* got a Sequential without any"),
        (nn.Linear(3, 3), r"got a bare Linear \(use QuantLinear.from_float\)"),
        (nn.Conv2d(3, 3, 1), r"got a bare Conv2d \(use QuantConv2d.from_float\)"),
    ],
    ids=["none", "linear", "conv"],
)
def test_nothing_to_quantize(bad, text):
    with pytest.raises(ValueError, match=text):
        quantize_(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named_and_nothing_changes(model, value):
    with torch.no_grad():
        model.last.weight[1, 2] = value
    before = state(model)
    with pytest.raises(ValueError, match=r"quantize_: last.weight must be finite, got 1 values"):
        quantize_(model)
    with pytest.raises(ValueError, match=r"quantize_: last.weight must be finite, got 1 values"):
        quantize_(model, QuantConfig("w4a8", "mse"))
    assert state(model).keys() == before.keys() and type(model.first) is nn.Linear


def test_weights_beyond_fp32_are_refused(model):
    model.double()
    with torch.no_grad():
        model.last.weight[1, 2] = 1e300
    with pytest.raises(ValueError, match=r"last.weight must be finite, .* infinite in fp32"):
        quantize_(model)


def test_weights_on_the_meta_device_are_refused(model):
    with pytest.raises(
        ValueError, match=r"first.weight must have values, got a tensor on the meta"
    ):
        quantize_(model.to("meta"))


def test_integer_weights_of_other_libraries_are_refused(model):
    codes = torch.zeros(6, 6, dtype=torch.int8)
    model.first.weight = nn.Parameter(codes, requires_grad=False)
    with pytest.raises(TypeError, match=r"first.weight must be a floating tensor, got torch.int8"):
        quantize_(model)


def test_layers_with_hooks_are_refused(model):
    model.first.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="quantize_: first must carry no hooks"):
        quantize_(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_models(model, dtype):
    model.to(dtype)
    bias = model.first.bias
    quantize_(model)
    assert model.first.scale.dtype == torch.float32
    assert model.first.bias is bias and model.first.weight.dtype == dtype


def test_dequantize_is_the_stored_weight(model):
    weight = model.convs[2].weight.detach().clone()
    quantize_(model)
    copied = dequantize(model.convs[2])
    step = model.convs[2].scale[:, None, None, None]
    assert copied.dtype == torch.float32 and ((copied - weight).abs() <= step * 0.50001).all()


def test_deepcopy_of_a_quantized_model(model):
    quantize_(model)
    ids = torch.arange(8).view(2, 4)
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))
