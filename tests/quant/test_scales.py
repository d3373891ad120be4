# SPDX-License-Identifier: Apache-2.0
"""Input scales of quantized modules, scales that train, and what their backward pass allocates."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from zo_kernels import rng
from zo_kernels.nn import (
    QuantConv2d,
    QuantLinear,
    input_stream,
    perturbed,
    set_scales_,
    streams_of,
    trainable_scales,
)
from zo_kernels.quant import (
    QuantConfig,
    absmax,
    dequantize,
    load_quantized,
    quantize_,
    save_quantized,
)

SEED, DRAWS, COEFFS = 1234567890123, (7, 2**40, 7), (0.01, -0.02, -0.01)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 32, 3, stride=2, padding=1, groups=2)
        self.mid = nn.Sequential(nn.Linear(32, 40), nn.SiLU(), nn.Linear(40, 5, bias=False))

    def forward(self, x):
        return self.mid(self.conv(x).permute(0, 2, 3, 1))


def make(spec="w8", what=()):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().eval().requires_grad_(False)
    quantize_(model, QuantConfig(spec, fallback="w8a8" if "a8" in spec else "w8"))
    if what:
        for i, scale in enumerate(trainable_scales(model, what).values()):
            with torch.no_grad():
                scale *= torch.linspace(0.9, 1.2 + i / 100, scale.numel()).view_as(scale)
    return model


def inputs(count=3):
    return torch.randn(count, 4, 7, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", ["w8", "w4a8"])
def test_in_scale_multiplies_the_channels_of_the_input(spec):
    for module, x in (
        (QuantLinear.from_float(nn.Linear(12, 9), absmax, spec), torch.randn(2, 3, 12)),
        (QuantConv2d.from_float(nn.Conv2d(12, 9, 3, groups=3), absmax, spec), inputs(6)),
    ):
        x = x if x.dim() == 3 else x.reshape(2, 12, 7, 6)
        factors = torch.linspace(0.5, 2, 12)
        along = factors if x.dim() == 3 else factors.view(-1, 1, 1)
        without = copy.deepcopy(module)
        module.in_scale = factors
        assert torch.equal(module(x), without(x * along))
        if spec == "w8":
            call = nn.functional.linear if x.dim() == 3 else nn.functional.conv2d
            more = () if x.dim() == 3 else (1, 0, 1, 3)
            exact = call(x, dequantize(module), module.bias, *more)
            torch.testing.assert_close(module(x), exact, rtol=1e-4, atol=1e-5)
        for dtype in (torch.float16, torch.bfloat16):
            assert module.to(dtype).in_scale.dtype == torch.float32


def test_state_dict_with_input_scales():
    model, x = make(what=("in_scale",)), inputs()
    other = make()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*in_scale"):
        other.load_state_dict(make().state_dict())
    bad = model.state_dict() | {"conv.in_scale": torch.ones(3)}
    with pytest.raises(ValueError, match=r"conv.in_scale must be \[4\], got shape \[3\]"):
        make().load_state_dict(bad)
    bad = model.state_dict() | {"conv.in_scale": torch.ones(4).half()}
    with pytest.raises(ValueError, match=r"conv.in_scale must be torch.float32"):
        make().load_state_dict(bad)


def version_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["zo_kernels"])["version"], set(file.keys())


def test_files_with_and_without_input_scales(tmp_path):
    """Without, they are as older versions wrote and read them; with, those say what is newer."""
    plain, scaled = tmp_path / "plain.safetensors", tmp_path / "scaled.safetensors"
    model, x = make(), inputs()
    save_quantized(model, plain)
    tuned = make(what=("scale", "in_scale"))
    save_quantized(tuned, scaled)
    (old, names), (new, more) = version_of(plain), version_of(scaled)
    assert (old, new) == (2, 3)
    assert more - names == {"conv.in_scale", "mid.0.in_scale", "mid.2.in_scale"}
    for start in (Net(), make(), make(what=("in_scale",))):
        loaded = load_quantized(copy.deepcopy(start), scaled)
        assert torch.equal(loaded(x), tuned(x)) and not loaded.conv.in_scale.requires_grad
        loaded = load_quantized(copy.deepcopy(start), plain)
        assert torch.equal(loaded(x), model(x)) and loaded.conv.in_scale is None


@pytest.mark.parametrize("spec", ["w8", "w4-g32-asym"])
def test_gradients_of_a_model_against_its_float_twin_in_fp64(spec):
    model, x = make(spec, what=("scale", "in_scale")), inputs()
    scales = trainable_scales(model, ("scale", "in_scale"))
    assert list(scales) == [
        f"{name}.{kind}" for name in ("conv", "mid.0", "mid.2") for kind in ("scale", "in_scale")
    ]
    found = torch.autograd.grad(model(x).square().sum(), list(scales.values()))

    twin, leaves, params = Net().double(), {}, {}
    for name in ("conv", "mid.0", "mid.2"):
        layer = model.get_submodule(name)
        scale, factors = layer.scale.detach().double(), layer.in_scale.detach().double()
        leaves[f"{name}.scale"] = scale.requires_grad_()
        leaves[f"{name}.in_scale"] = factors.requires_grad_()
        rows = layer.codes().movedim(1, -1).double().reshape(*scale.shape, -1)
        if layer.zero_point is not None:
            rows -= layer.zero_point[..., None]
        n, channels, *taps = layer.weight.shape
        weight = (rows * scale[..., None]).view(n, *taps, channels).movedim(-1, 1)
        groups = getattr(layer, "groups", 1)
        along = factors.view(groups, 1, channels, *[1] * len(taps))
        params[f"{name}.weight"] = (weight.unflatten(0, (groups, -1)) * along).flatten(0, 1)
        if layer.bias is not None:
            params[f"{name}.bias"] = layer.bias.double()
    y = torch.func.functional_call(twin, params, (x.double(),))
    wanted = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    for name, g, w in zip(scales, found, wanted, strict=True):
        assert (g - w).norm() < 2e-6 * w.norm(), name


def test_sets_take_turns_and_gradients_reach_what_they_are_made_of():
    model, x = make(), inputs()
    base = {k: v.detach() for k, v in trainable_scales(model).items()}
    r = {k: torch.zeros_like(v).requires_grad_() for k, v in base.items()}
    before = model(x)
    set_scales_(model, {k: base[k] * (1 + r[k]) for k in base})
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert all(bool(v.grad.abs().sum() > 0) for v in r.values())
    set_scales_(model, {k: 2 * v for k, v in base.items()} | {"conv.in_scale": torch.ones(4)})
    assert not torch.equal(model(x), before) and not model(x).requires_grad
    set_scales_(model, base | {"conv.in_scale": None})
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: trainable_scales(m, "scale"), ValueError, "what must be a sequence of scale"),
        (lambda m: trainable_scales(m, ("bias",)), ValueError, r"what .* got \('bias',\)"),
        (lambda m: trainable_scales(m, names=("x*",)), ValueError, "names must be patterns"),
        (lambda m: trainable_scales(m, names="mid"), TypeError, "names must be a sequence"),
        (lambda m: set_scales_(m, {"no.scale": torch.ones(1)}), ValueError, "got 'no.scale'"),
        (lambda m: set_scales_(m, {"conv.bias": torch.ones(32)}), ValueError, "got 'conv.bias'"),
        (lambda m: set_scales_(m, {"conv.scale": torch.ones(3)}), ValueError, r"\[32\], got \[3\]"),
        (lambda m: set_scales_(m, {"conv.scale": None}), ValueError, r"\[32\], got None"),
        (
            lambda m: set_scales_(m, {"conv.in_scale": torch.ones(4).half()}),
            TypeError,
            "must be float32",
        ),
    ],
)
def test_refuses(call, error, text):
    model = make()
    with pytest.raises(error, match=text):
        call(model)
    assert not model.conv.scale.requires_grad


@pytest.mark.parametrize("spec", ["w8", "w8a8"])
@pytest.mark.parametrize("what", ["scale", "scale_relative"])
@pytest.mark.parametrize("both", [False, True])
def test_perturbed_with_input_scales_equals_scales_moved_by_hand(spec, what, both):
    model, x = make(spec, ("in_scale",)), inputs()
    coeffs = [c * (1e-2 if what == "scale" else 1) for c in COEFFS]
    how = {"seed": SEED, "draws": DRAWS, "coeffs": coeffs, "what": what, "inputs": both}
    with torch.no_grad(), perturbed(model, **how):
        together = model(x)
    assert all(m.in_scales is None for m in model.modules() if hasattr(m, "in_scales"))
    for p, draw in enumerate(DRAWS):
        by_hand, moved = copy.deepcopy(model), {}
        for name, stream in streams_of(model).items():
            layer = by_hand.get_submodule(name)
            places = {"scale": stream} | ({"in_scale": input_stream(stream)} if both else {})
            for kind, place in places.items():
                now = getattr(layer, kind).detach()
                z = rng.noise(now.shape, seed=SEED, draw=draw, stream=place, kind="rademacher")
                step = torch.tensor(coeffs[p]) * z
                moved[f"{name}.{kind}"] = now + step if what == "scale" else now * (1 + step)
        set_scales_(by_hand, moved)
        with torch.no_grad():
            alone = by_hand(x[p : p + 1])
        torch.testing.assert_close(together[p : p + 1], alone, rtol=2e-5, atol=2e-6)


def test_inputs_cannot_be_perturbed_without_input_scales():
    for model, what in ((make(), "scale"), (make(what=("in_scale",)), "weight")):
        with (
            pytest.raises(ValueError, match="inputs must be False unless"),
            perturbed(model, seed=1, draws=[0], coeffs=[0.1], what=what, inputs=True),
        ):
            raise AssertionError


def test_streams_of_inputs_are_others():
    assert input_stream(0) == 2**31 and input_stream(2**31 + 5) == 5


@pytest.mark.parametrize("spec", ["w8", "w4-g32"])
def test_peak_of_the_backward_pass(extra_memory, spec):
    """Real bytes: far below a float weight, for the scales of a layer of 64 MiB in fp32."""
    layer = QuantLinear(4096, 4096, spec=spec)
    scales = trainable_scales(nn.ModuleDict({"layer": layer}), ("scale", "in_scale"))
    x = torch.randn(8, 4096)

    def step():
        layer(x).square().sum().backward()

    step()
    grown = extra_memory(step)
    assert all(scale.grad is not None for scale in scales.values())
    assert grown < 16 << 20
