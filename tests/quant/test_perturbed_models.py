# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

from zo_kernels import rng
from zo_kernels.nn import QuantLinear, perturbed, streams_of
from zo_kernels.quant import QuantConfig, quantize_

SEED = 1234567890123
DRAWS = (7, 2**40, 7)
COEFFS = (0.01, -0.02, -0.01)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.norm = nn.GroupNorm(2, 32)
        self.mid = nn.ModuleList([nn.Linear(32, 40), nn.Linear(40, 32, bias=False)])
        self.out = nn.Conv2d(32, 5, 1)

    def forward(self, x):
        x = self.norm(self.conv(x)).permute(0, 2, 3, 1)
        for layer in self.mid:
            x = torch.nn.functional.silu(layer(x))
        return self.out(x.permute(0, 3, 1, 2))


def make(spec="w8", **config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().eval().requires_grad_(False)
    quantize_(model, QuantConfig(spec, fallback="w8a8" if "a8" in spec else "w8", **config))
    return model


def inputs(count=3):
    return torch.randn(count, 3, 6, 5, generator=torch.Generator().manual_seed(1))


def run(model, x, **options):
    with torch.no_grad(), perturbed(model, seed=SEED, **options):
        return model(x)


def test_streams_are_places_among_the_quantized_modules():
    model = make()
    assert streams_of(model) == {"conv": 0, "mid.0": 1, "mid.1": 2, "out": 3}
    assert streams_of(model.mid) == {"0": 0, "1": 1}
    assert streams_of(nn.Sequential(nn.Linear(2, 2))) == {}
    model.again = model.out
    assert list(streams_of(model)) == ["conv", "mid.0", "mid.1", "out"]
    skipping = make(skip=("mid.0",))
    assert streams_of(skipping) == {"conv": 0, "mid.1": 1, "out": 2}


@pytest.mark.parametrize("spec", ["w8", "w8a8", "w4a8-g32-asym"])
@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize("what", ["scale", "scale_relative"])
def test_equals_scales_perturbed_by_hand(spec, kind, what):
    """Each part of the batch alone; where integers are accumulated, bit for bit."""
    model, x = make(spec), inputs()
    coeffs = COEFFS if what == "scale_relative" else [1e-2 * c for c in COEFFS]
    together = run(model, x, draws=DRAWS, coeffs=coeffs, what=what, kind=kind)
    factors = torch.tensor(coeffs)
    for p, draw in enumerate(DRAWS):
        by_hand = copy.deepcopy(model)
        for name, stream in streams_of(model).items():
            scale = by_hand.get_submodule(name).scale
            z = rng.noise(scale.numel(), seed=SEED, draw=draw, stream=stream, kind=kind)
            step = factors[p] * z.view_as(scale)
            scale.copy_(scale + step if what == "scale" else scale * (1 + step))
        with torch.no_grad():
            alone = by_hand(x[p : p + 1])
        if model.mid[0].spec.act_bits == 8 and model.conv.spec.act_bits == 8:
            assert torch.equal(together[p : p + 1], alone)
        torch.testing.assert_close(together[p : p + 1], alone, rtol=2e-5, atol=2e-6)
        assert not torch.allclose(alone, model(x[p : p + 1]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("what", ["weight", "codes"])
@pytest.mark.parametrize("spec", ["w8", "w4", "w4-g32"])
def test_equals_codes_perturbed_by_hand(spec, what):
    model, x = make(spec, headroom=3), inputs(6)
    steps = (2.0, -3.0, 1.0) if what == "codes" else (0.25, -1.5, 3.0)
    together = run(model, x, draws=DRAWS, coeffs=steps, what=what)
    for p, draw in enumerate(DRAWS):
        by_hand = copy.deepcopy(model)
        for name, stream in streams_of(model).items():
            layer = by_hand.get_submodule(name)
            unit = 1 / 16 if what == "codes" and layer.spec.bits == 4 else 1
            z = signs(layer, draw, stream) * steps[p] * unit
            twin = make_float(layer, layer.dequantized() + units(layer) * z)
            parent = by_hand.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], twin)
        part = slice(2 * p, 2 * p + 2)
        with torch.no_grad():
            alone = by_hand(x[part])
        noise = (together[part] - alone).norm() / alone.norm()
        assert noise < 1e-5
        assert (together[part] - model(x[part])).norm() / alone.norm() > 1e-3


def test_integer_codes_moved_by_hand():
    """With int8 activations too: in one pass what moved codes give in three, bit for bit."""
    model, x = make("w8a8", headroom=3), inputs(6)
    steps = (2.0, -3.0, 1.0)
    together = run(model, x, draws=DRAWS, coeffs=steps, what="codes")
    for p, draw in enumerate(DRAWS):
        by_hand = copy.deepcopy(model)
        for name, stream in streams_of(model).items():
            layer = by_hand.get_submodule(name)
            layer.set_codes(
                layer.codes() + (signs(layer, draw, stream) * steps[p]).char(), layer.scale
            )
        part = slice(2 * p, 2 * p + 2)
        with torch.no_grad():
            assert torch.equal(together[part], by_hand(x[part]))


def signs(layer, draw, stream):
    """R in the shape of the weight: element i = n * K + k, k = tap * C + c."""
    n, channels, *taps = layer.weight.shape
    options = {"seed": SEED, "draw": draw, "stream": stream, "kind": "rademacher"}
    return rng.noise(layer.weight.numel(), **options).view(n, *taps, channels).movedim(-1, 1)


def units(layer):
    """The scale of each weight."""
    codes = layer.codes()
    ones = copy.deepcopy(layer)
    ones.set_codes(torch.ones_like(codes), layer.scale, layer.zero_point)
    return ones.dequantized()


def make_float(layer, weight):
    if isinstance(layer, QuantLinear):
        twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    else:
        twin = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size)
    twin.weight = nn.Parameter(weight)
    twin.bias = layer.bias
    return twin.requires_grad_(False)


@pytest.mark.parametrize("what", ["scale", "weight"])
def test_only_named_modules_with_the_streams_of_the_whole_model(what):
    model, x = make(), inputs()
    options = {"draws": DRAWS, "coeffs": [1e-4 * c for c in COEFFS], "what": what}
    with perturbed(model, seed=SEED, names=("mid.*",), **options) as used:
        assert used == {"mid.0": 1, "mid.1": 2}
        assert not model.conv.perturbation and model.mid[0].perturbation["stream"] == 1
        chosen = model(x)
    with perturbed(model, seed=SEED, streams={"mid.0": 1, "mid.1": 2}, names=("mid.?",), **options):
        assert torch.equal(model(x), chosen)
    with perturbed(model, seed=SEED, streams={"mid.0": 5, "mid.1": 6}, names=("mid.?",), **options):
        assert not torch.equal(model(x), chosen)
    assert not torch.equal(run(model, x, **options), chosen)


def test_nothing_is_left_after_the_block_nor_after_an_error():
    model, x = make(headroom=1), inputs()
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    for what in ("scale", "scale_relative", "weight", "codes"):
        inside = run(model, x, draws=DRAWS, coeffs=(1.0, -1.0, 0.0), what=what)
        assert not torch.equal(inside, before)
        assert torch.equal(model(x), before)
    with (
        pytest.raises(KeyError, match="mine"),
        perturbed(model, seed=1, draws=[0], coeffs=[1.0]),
    ):
        raise KeyError("mine")
    assert torch.equal(model(x), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_coefficient_zero_changes_nothing():
    for spec in ("w8", "w8a8"):
        model, x = make(spec, headroom=1), inputs()
        for what in ("scale", "scale_relative", "weight", "codes"):
            out = run(model, x, draws=DRAWS, coeffs=(0.0, 0.0, 0.0), what=what)
            torch.testing.assert_close(out, model(x), rtol=1e-6, atol=1e-6)


def test_coefficients_are_copied():
    model, x = make(), inputs()
    coeffs = torch.tensor(COEFFS)
    with perturbed(model, seed=1, draws=DRAWS, coeffs=coeffs, what="scale_relative"):
        before = model(x)
        coeffs.zero_()
        assert torch.equal(model(x), before)


def test_nesting_is_refused_and_the_outer_block_goes_on():
    model, x = make(), inputs()
    with perturbed(model, seed=1, draws=[0], coeffs=[0.5], names=("out",)):
        before = model(x)
        with (
            pytest.raises(RuntimeError, match="model must not be perturbed already, got 'out'"),
            perturbed(model, seed=1, draws=[0], coeffs=[0.5]),
        ):
            raise AssertionError
        assert torch.equal(model(x), before) and not model.conv.perturbation
        with perturbed(model, seed=1, draws=[0], coeffs=[0.5], names=("mid.*",)):
            assert not torch.equal(model(x), before)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"draws": [], "coeffs": []}, "draws must be at least one number, got none"),
        ({"coeffs": [1.0]}, r"coeffs must be 2 numbers, got \[1\]"),
        ({"coeffs": [1.0, float("nan")]}, r"coeffs must be finite, got \[1.0, nan\]"),
        ({"coeffs": [1.0, 1e39]}, r"coeffs must be finite, got \[1.0, inf\]"),
        ({"what": "weights"}, "what must be one of scale, scale_relative, weight, codes, got 'we"),
        ({"kind": "uniform"}, "kind must be one of normal, rademacher, got 'uniform'"),
        ({"seed": 2**64}, "seed must be 64-bit, got 18446744073709551616"),
        ({"draws": [0, -(2**64)]}, "draws must be 64-bit"),
        (
            {"names": ("mid.*", "x*")},
            r"names must be patterns .* got 'x\*', which matches none of 4",
        ),
        (
            {"streams": {"conv": 0}},
            r"streams must be in \[0, 2\^32\) for every module, 'mid.0' too",
        ),
        ({"streams": dict.fromkeys(("conv", "mid.0", "mid.1", "out"), -1)}, "streams must be in"),
        ({"what": "codes", "coeffs": [0.5, 1]}, "coeffs must be integers for codes"),
        (
            {"what": "codes", "coeffs": [1, -4]},
            "coeffs must be at most the headroom of 'conv' .* is 3, got 4; ",
        ),
    ],
)
def test_refuses(changes, text):
    model = make(headroom=3)
    options = {"seed": 1, "draws": [0, 1], "coeffs": [1.0, -1.0], **changes}
    with pytest.raises(ValueError, match=f"perturbed: {text}"), perturbed(model, **options):
        raise AssertionError
    assert not any(m.perturbation for m in model.modules() if hasattr(m, "perturbation"))


def test_codes_without_room_are_refused():
    for spec in ("w8", "w8-asym"):
        with (
            pytest.raises(ValueError, match="which is 0, got 1; quantize with QuantConfig"),
            perturbed(make(spec), seed=1, draws=[0], coeffs=[1], what="codes"),
        ):
            raise AssertionError
    with (
        pytest.raises(ValueError, match="which is 15, got 16; round to symmetric 4 bits"),
        perturbed(make("w4"), seed=1, draws=[0], coeffs=[16], what="codes"),
    ):
        raise AssertionError
    with (
        pytest.raises(TypeError, match="names must be a sequence of patterns, got the string"),
        perturbed(make(), seed=1, draws=[0], coeffs=[1], names="mid.*"),
    ):
        raise AssertionError


def test_a_batch_that_the_perturbations_do_not_divide_is_refused_by_the_op():
    model = make()
    with (
        pytest.raises(ValueError, match="x must be of a batch that 2 perturbations divide"),
        perturbed(model, seed=1, draws=[0, 1], coeffs=[1, 1]),
    ):
        model(inputs(3))
    assert not model.conv.perturbation


def test_compiles_and_sees_new_draws():
    model, x = make("w8a8"), inputs(2)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for draw in (3, 4):
            with perturbed(model, seed=1, draws=[draw, 9], coeffs=[1e-3, -1e-3]):
                torch.testing.assert_close(compiled(x), model(x))
