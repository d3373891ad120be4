# SPDX-License-Identifier: Apache-2.0
"""Weights that optimum-quanto itself quantized, and what it dequantizes."""

import json

import pytest
import torch
from optimum.quanto import freeze, qfloat8, qint4, qint8, quantize
from safetensors.torch import load_file, save_file
from torch import nn

from zo_kernels.nn import QuantConv2d, QuantLinear
from zo_kernels.quant import dequantize, load_quantized, quantize_, save_quantized
from zo_kernels.quant.imports import load_quanto


def net(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1),
            nn.GroupNorm(1, 5),
            nn.Flatten(),
            nn.Linear(80, 7),
            nn.LayerNorm(7),
            nn.Linear(7, 6, bias=False),
        ).to(dtype)


def quanto(model, weights=qint8, activations=None):
    quantize(model, weights=weights, activations=activations)
    freeze(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["state dict", "file"])
def test_weights_are_bit_for_bit_what_quanto_dequantizes(tmp_path, dtype, form):
    source = quanto(net(dtype))
    state = source.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    model = net(dtype).to("meta")
    report = load_quanto(model, state if form == "state dict" else tmp_path)
    assert report.quantized == {"0": "w8", "3": "w8", "5": "w8"} and not report.skipped
    assert type(model[0]) is QuantConv2d and type(model[3]) is QuantLinear
    for name in report.quantized:
        theirs = source.get_submodule(name).weight.dequantize()
        # Their product has the dtype of the scale: ours, rounded once more, is the same.
        assert torch.equal(dequantize(model.get_submodule(name)).to(theirs.dtype), theirs)
    for name in ("0.bias", "1.weight", "4.bias"):
        assert torch.equal(model.state_dict()[name], state[name])
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        theirs, ours = source(x).float(), model(x).float()
    noise = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    assert (theirs - ours).norm() < noise * theirs.norm()


def test_our_own_rounding_is_theirs():
    """`absmax` of w8 says that it is: same codes and scales from the same weights."""
    theirs, ours = quanto(net()), net()
    quantize_(ours)
    for name in ("0", "3", "5"):
        weight, layer = theirs.get_submodule(name).weight, ours.get_submodule(name)
        assert torch.equal(weight._scale.flatten(), layer.scale)
        assert torch.equal(weight._data, layer.codes())


def test_activations_are_a_choice():
    state = quanto(net(), activations=qint8).state_dict()
    model = net()
    assert set(load_quanto(model, state).quantized.values()) == {"w8"}
    model = net()
    assert set(load_quanto(model, state, act_bits=8).quantized.values()) == {"w8a8"}
    assert model(torch.ones(1, 3, 4, 4)).isfinite().all()


def test_floats_take_the_dtype_of_the_model(tmp_path):
    model = net(torch.bfloat16)
    load_quanto(model, quanto(net()).state_dict())
    assert model[0].bias.dtype == model[1].weight.dtype == model[0].weight.dtype == torch.bfloat16
    assert model[0].scale.dtype == torch.float32
    save_quantized(model, tmp_path / "ours.safetensors")
    loaded = load_quantized(net(torch.bfloat16), tmp_path / "ours.safetensors")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_the_unet_of_diffusers(unet, tmp_path):
    """As `QuantizedDiffusersModel` writes it: a folder with the tensors and a map of the layers."""
    source = type(unet).from_config(unet.config)
    source.load_state_dict(unet.state_dict())
    quanto(source.eval())
    save_file(source.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "quanto_qmap.json").write_text(json.dumps({}))
    report = load_quanto(unet, tmp_path)
    count = sum(name.endswith(".weight._data") for name in source.state_dict())
    assert len(report.quantized) == count and not report.skipped
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 7, 32, generator=g)
    with torch.no_grad():
        theirs, ours = source(x, torch.tensor(5), text)[0], unet(x, torch.tensor(5), text)[0]
    assert (theirs - ours).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("weights", [qint4, qfloat8], ids=str)
def test_other_types_are_refused(weights):
    model = nn.Sequential(nn.Linear(256, 128))
    state = quanto(nn.Sequential(nn.Linear(256, 128)), weights).state_dict()
    with pytest.raises(ValueError, match=r"load_quanto: (0.weight must be qint8|source must hold)"):
        load_quanto(model, state)
    assert type(model[0]) is nn.Linear


BAD = {
    "axis": (
        {"3.weight._scale": torch.ones(1, 80)},
        r"_scale must be one value per output channel",
    ),
    "scale": (
        {"3.weight._scale": None},
        "3.weight must be qint8 with a scale, got torch.int8 without one",
    ),
    "dtype": ({"3.weight._data": torch.ones(7, 80).byte()}, "3.weight must be qint8 with a scale"),
    "shape": (
        {"3.weight._data": torch.ones(7, 81).char()},
        r"got 3 with a weight of \(7, 81\) where",
    ),
    "missing": ({"3.bias": None}, r"got 3.bias of shape none where the model has \(7,\)"),
    "extra": ({"8.bias": torch.ones(2)}, r"got 8.bias of shape \(2,\) where the model has none"),
    "nan": ({"3.weight._scale": torch.full((7, 1), float("nan"))}, "3.scale must be finite, got 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_changes_nothing(case):
    changes, text = BAD[case]
    state = {**quanto(net()).state_dict(), **changes}
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"load_quanto: .*{text}|load_quanto: {text}"):
        load_quanto(model, {k: v for k, v in state.items() if v is not None})
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in after)


def test_shared_weights_and_embeddings_become_floats():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, False)})
    model["mid"] = nn.Linear(4, 4)
    model["head"].weight = model["embed"].weight
    codes = torch.arange(-10, 10, dtype=torch.int8).view(5, 4)
    state = {
        "head.weight._data": codes,
        "head.weight._scale": torch.full((5, 1), 0.5),
        "mid.weight._data": codes[:4],
        "mid.weight._scale": torch.tensor(0.25),  # one scale for the whole tensor
        "mid.bias": torch.zeros(4),
    }
    report = load_quanto(model, state)
    assert report.quantized == {"mid": "w8"}
    assert report.skipped == {"head": "its weight is shared with embed.weight"}
    assert model["head"].weight is model["embed"].weight
    assert torch.equal(model["embed"].weight, codes * 0.5)
    assert torch.equal(dequantize(model["mid"]), codes[:4] * 0.25)


def test_their_files_load_as_we_read_them(tmp_path):
    """The reader of the importers gives what the library's does."""
    state = quanto(net()).state_dict()
    save_file(state, tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == state.keys()
    model = net()
    load_quanto(model, str(tmp_path / "m.safetensors"))
    assert torch.equal(model[3].codes(), state["3.weight._data"])
