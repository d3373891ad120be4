# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from zo_kernels.nn import Spec
from zo_kernels.nn._korder import dequantized, from_rows, to_rows
from zo_kernels.quant import absmax, l24, mse
from zo_kernels.quant import rounding as rounding_module
from zo_kernels.quant.rounding import ROUNDINGS

SPECS = ("w8", "w8-asym", "w4", "w4-asym", "w8-g32", "w4-g32", "w4a8-g64-asym")


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def error(weight, rounded):
    return (dequantized(*rounded) - weight.float()).double().square()


@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (127, 1000), (8, 3, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_absmax_is_within_half_a_step_and_uses_the_whole_range(shape, dtype):
    weight = normal(*shape).to(dtype)
    codes, scale, zero_point = absmax(weight)
    assert codes.shape == weight.shape and codes.dtype == torch.int8 and zero_point is None
    assert scale.shape == shape[:1] and scale.dtype == torch.float32
    assert (codes.flatten(1).abs().amax(1) == 127).all()
    step = scale.double().view(-1, *[1] * (len(shape) - 1))
    assert ((codes * step - weight.double()).abs() <= step * 0.50001).all()


def test_absmax_follows_the_rule():
    codes, scale, _ = absmax(torch.tensor([[-12.7, 0.25, 0.15, 6.0]]))
    assert scale.item() == pytest.approx(0.1)
    assert codes.tolist() == [[-127, 2, 2, 60]]  # 2.5 goes to the even 2, 1.5 to the even 2
    codes, scale, _ = absmax(torch.tensor([[-7.0, 2.5, 1.5, 6.0]]), "w4")
    assert (codes.tolist(), scale.item()) == ([[-7, 2, 2, 6]], 1)
    codes, scale, zero = absmax(torch.tensor([[-5.0, 10.0, 0.0, 4.6]]), "w4-asym")
    assert (codes.tolist(), scale.item(), zero.item()) == ([[-8, 7, -3, 2]], 1, -3)


@pytest.mark.parametrize("rule", ROUNDINGS.values(), ids=ROUNDINGS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(5, 64), (3, 64, 3, 3), (300, 128)], ids=str)
def test_form_and_range(rule, spec, shape):
    spec, weight = Spec.parse(spec), normal(*shape)
    codes, scale, zero_point = rule(weight, spec)
    assert codes.shape == shape and codes.dtype == torch.int8
    assert scale.shape == spec.scale_shape(shape) and scale.dtype == torch.float32
    assert (scale > 0).all()
    low, high = spec.code_range
    assert codes.min() >= (low if spec.asymmetric else -high) and codes.max() <= high
    assert (zero_point is not None) == spec.asymmetric
    if zero_point is not None:
        assert zero_point.shape == scale.shape and zero_point.dtype == torch.int8
        assert zero_point.min() >= low and zero_point.max() <= high
    noise = error(weight, (codes, scale, zero_point)).sum() / weight.double().square().sum()
    assert noise < (2e-4 if spec.bits == 8 else 3e-2)


@pytest.mark.parametrize("spec", SPECS)
def test_groups_run_along_k(spec):
    """Each group is rounded as a channel of its own would be."""
    spec, weight = Spec.parse(spec), normal(3, 64, 3, 3)
    if not spec.group:
        spec = Spec(spec.bits, spec.act_bits, 32, spec.asymmetric)
    alone = Spec(spec.bits, 16, None, spec.asymmetric)
    rows = to_rows(weight).reshape(-1, spec.group)  # k = (r * kw + s) * C + c
    for rule in (absmax, mse):
        codes, scale, zero_point = rule(weight, spec)
        one = rule(rows, alone)
        assert torch.equal(to_rows(codes).reshape(rows.shape), one.codes)
        assert torch.equal(scale.flatten(), one.scale)
        assert zero_point is None or torch.equal(zero_point.flatten(), one.zero_point)


def test_rows_and_back():
    weight = normal(2, 3, 4, 5)
    rows = to_rows(weight)
    assert rows[1, (2 * 5 + 3) * 3 + 1] == weight[1, 1, 2, 3]
    assert torch.equal(from_rows(rows, weight.shape), weight)


@pytest.mark.parametrize("headroom", [1, 3, 63])
@pytest.mark.parametrize("rule", ROUNDINGS.values(), ids=ROUNDINGS)
def test_headroom(rule, headroom):
    weight = normal(9, 64)
    codes = rule(weight, "w8", headroom).codes
    assert codes.abs().max() <= 127 - headroom
    assert rule is not absmax or (codes.abs().amax(1) == 127 - headroom).all()
    assert rule(weight, "w4", headroom).codes.abs().max() <= 7


@pytest.mark.parametrize("spec", ["w8", "w4", "w4-asym", "w4-g32"])
def test_range_search_never_loses_and_wins_at_4_bits(spec):
    weight = normal(40, 192)
    weight[3, 5] = 30.0  # an outlier that is not worth its range
    spec = Spec.parse(spec)
    best, plain = error(weight, mse(weight, spec)), error(weight, absmax(weight, spec))
    groups = (40, -1, spec.group or 192)
    best, plain = (e.view(groups).sum(2) for e in (best, plain))
    assert (best <= plain * (1 + 1e-6)).all()
    if spec.bits == 4:
        assert best.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rule", "order"), [(mse, 2), (l24, 2.4)])
def test_range_search_finds_the_best_of_the_80_ranges(rule, order, bits):
    """In the words of Q-Diffusion: max * (1 - 0.01 i) for i below 80, the least |error|^order."""
    weight = normal(6, 50) ** 3
    limit = 2 ** (bits - 1) - 1
    _, scale, _ = rule(weight, Spec(bits))
    for row, got in zip(weight, scale, strict=True):
        tried = []
        for i in range(80):
            step = row.abs().max() * (1 - 0.01 * i) / limit
            codes = (row / step).round().clamp(-limit, limit)
            error = (codes * step - row).double().abs() ** order
            tried.append((error.sum().item(), step.item()))
        least = min(e for e, _ in tried)
        chosen = min(tried, key=lambda pair: abs(pair[1] - got.item()))
        assert chosen[1] == pytest.approx(got.item(), rel=1e-6)
        assert chosen[0] <= least * (1 + 1e-5)


def test_asymmetric_search_by_the_2_4th_power_finds_the_best_of_the_80_ranges():
    weight = normal(6, 50) ** 3 + 0.5
    _, scale, zero = l24(weight, "w4-asym")
    for row, got, offset in zip(weight, scale, zero, strict=True):
        tried = []
        for i in range(80):
            low, high = (bound * (1 - 0.01 * i) for bound in row.aminmax())
            step = (high - low) / 15
            o = (-8 - low / step).round().clamp(-8, 7)
            codes = ((row / step).round() + o).clamp(-8, 7)
            error = ((codes - o) * step - row).double().abs() ** 2.4
            tried.append((error.sum().item(), step.item(), o.item()))
        best = min(tried)
        assert best[1] == pytest.approx(got.item(), rel=1e-6) and best[2] == offset


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", ["uniform", "normal", "heavy tails", "one side"])
def test_ranges_that_are_left_out_could_not_win(monkeypatch, spec, shape):
    weight = normal(20, 192)
    weight = {
        "uniform": torch.rand(20, 192, generator=torch.Generator().manual_seed(1)) - 0.4,
        "normal": weight,
        "heavy tails": weight**5,
        "one side": weight.abs() + 3,
    }[shape]
    quick = mse(weight, spec)
    calls = []
    monkeypatch.setattr(rounding_module, "_hopeless", lambda *_: calls.append(1))
    for one, other in zip(mse(weight, spec), quick, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert calls


@pytest.mark.parametrize("rule", ROUNDINGS.values(), ids=ROUNDINGS)
@pytest.mark.parametrize("spec", ["w8", "w4", "w8-asym", "w4-asym"])
@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-38])
def test_channels_of_almost_nothing_stay_finite(rule, spec, value):
    weight = torch.tensor([[value, -value], [1.0, 2.0]])
    rounded = rule(weight, spec)
    assert rounded.scale.isfinite().all() and (rounded.scale > 0).all()
    torch.testing.assert_close(dequantized(*rounded)[0], weight[0], rtol=0, atol=1.2e-38)


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_a_code_whatever_the_signs(sign):
    weight = sign * (normal(4, 32).abs() + 5)
    weight[:, 0] = 0
    codes, scale, zero_point = absmax(weight, "w4-asym")
    assert (dequantized(codes, scale, zero_point)[:, 0] == 0).all()


def test_weight_is_unchanged_whatever_its_layout():
    weight = normal(4, 3, 5, 5)
    plain = mse(weight, "w4")
    last = weight.to(memory_format=torch.channels_last)
    before = last.clone()
    assert torch.equal(mse(last, "w4").codes, plain.codes) and torch.equal(last, before)
    flipped = weight.flatten(1).t().contiguous().t()
    assert torch.equal(mse(flipped, "w4").scale, plain.scale)


def test_chunks_do_not_show(monkeypatch):
    weight = normal(33, 64)
    whole = mse(weight, "w4-g32-asym")
    monkeypatch.setattr(rounding_module, "_CHUNK", 100)
    for one, other in zip(mse(weight, "w4-g32-asym"), whole, strict=True):
        assert torch.equal(one, other)


def test_memory_is_bounded_by_the_chunk(extra_memory):
    weight = normal(4096, 4096)  # 64 MiB; its codes are 16 MiB
    for rule in (absmax, mse):
        rule(weight[:64], "w4-g64")
        if rule is mse:
            weight = weight[:1024]
        assert extra_memory(lambda rule=rule, weight=weight: rule(weight, "w4-g64")) < 36 << 20


@pytest.mark.parametrize(
    ("spec", "headroom", "shape", "text"),
    [
        ("w4-g64", 0, (2, 65), "weight must be one that w4-g64 can store, got one of which groups"),
        ("w8", 0, (0, 4), "got one of which it is empty"),
        ("w8", 64, (2, 4), "headroom must be an integer from 0 to 63, got 64"),
        ("w8", -1, (2, 4), "headroom must be an integer from 0 to 63, got -1"),
        ("w8", 1.5, (2, 4), "headroom must be an integer from 0 to 63, got 1.5"),
        ("w8-asym", 1, (2, 4), "headroom must be 0 where codes are asymmetric"),
        ("w5", 0, (2, 4), "spec must be w8, w4,"),
    ],
)
def test_refuses(spec, headroom, shape, text):
    with pytest.raises(ValueError, match=text):
        absmax(torch.ones(shape), spec, headroom)
