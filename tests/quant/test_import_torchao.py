# SPDX-License-Identifier: Apache-2.0
"""Files that torchao 0.18.0 wrote (tests/golden/make_torchao.py), with what it dequantizes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from zo_kernels.quant import load_quantized, save_quantized
from zo_kernels.quant.imports import load_torchao

GOLDEN = Path(__file__).parents[1] / "golden" / "torchao"
SPECS = {
    "rows": {"0": "w8", "2": "w8"},
    "groups": {"0": "w8-g32"},
    "tensor": {"0": "w8", "2": "w8"},
    "dynamic": {"0": "w8a8", "2": "w8a8"},
    "dynamic_bfloat16": {"0": "w8a8", "2": "w8a8"},
}


def net(dtype=torch.float32):
    return nn.Sequential(nn.Linear(64, 9), nn.LayerNorm(9), nn.Linear(9, 5, bias=False)).to(dtype)


def split(path):
    """(tensors of the source, layer -> what torchao dequantizes, metadata)."""
    tensors = load_file(path)
    expected = {k: tensors.pop(k) for k in list(tensors) if k.startswith("expected.")}
    with safe_open(path, "pt") as file:
        return (
            tensors,
            {k.removeprefix("expected."): v for k, v in expected.items()},
            file.metadata(),
        )


@pytest.fixture(params=SPECS)
def case(request, tmp_path):
    """(name, path of the file as torchao would have written it, expected weights)."""
    tensors, expected, metadata = split(GOLDEN / f"{request.param}.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    return request.param, tmp_path / "model.safetensors", expected


class Int8Tensor(torch.Tensor):
    """What the importer sees of torchao's class of that name, without torchao."""

    @staticmethod
    def __new__(cls, qdata, dtype, **attributes):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype)

    def __init__(self, qdata, dtype, **attributes):
        self.qdata = qdata
        self.__dict__.update(attributes)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("the importer has to read attributes only")


def in_memory(path):
    """The state dict that the file was flattened from."""
    tensors, _, metadata = split(path)
    state = {}
    for name in json.loads(metadata["tensor_names"]):
        described = json.loads(metadata[name])
        if described["_type"] == "Tensor":
            state[name] = tensors[name]
            continue
        module, parameter = name.rsplit(".", 1)
        parts = {
            key: tensors.get(f"{module}._{parameter}_{key}")
            for key in ("scale", "zero_point", "act_pre_scale", "act_quant_scale")
        }
        data = described["_data"]
        kwargs = data["act_quant_kwargs"]
        if kwargs is not None:
            granularity = type(kwargs["_data"]["granularity"]["_type"], (), {})()
            mapping = SimpleNamespace(name=kwargs["_data"]["mapping_type"]["_data"])
            kwargs = SimpleNamespace(granularity=granularity, mapping_type=mapping)
        state[name] = Int8Tensor(
            tensors[f"{module}._{parameter}_qdata"],
            getattr(torch, data["dtype"]["_data"]),
            block_size=data["block_size"],
            act_quant_kwargs=kwargs,
            **parts,
        )
    return state


@pytest.mark.parametrize("form", ["file", "state dict"])
def test_weights_are_bit_for_bit_what_torchao_dequantizes(case, form):
    name, path, expected = case
    model = net(next(iter(expected.values())).dtype).to("meta")
    report = load_torchao(model, path if form == "file" else in_memory(path))
    assert report.quantized == SPECS[name]
    for layer, weight in expected.items():
        assert torch.equal(model.get_submodule(layer).dequantized().to(weight.dtype), weight)
    plain, _, _ = split(path)
    for key in {"0.bias", "1.weight", "1.bias"}:
        assert torch.equal(model.state_dict()[key], plain[key])
    x = torch.randn(3, 64, dtype=model[0].bias.dtype)
    assert model(x).isfinite().all()


def test_the_imported_model_is_saved_and_loaded(case, tmp_path):
    _, path, expected = case
    dtype = next(iter(expected.values())).dtype
    model = net(dtype)
    load_torchao(model, path)
    save_quantized(model, tmp_path / "ours.safetensors")
    loaded = load_quantized(net(dtype).to("meta"), tmp_path / "ours.safetensors")
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["dynamic_asymmetric", "dynamic_tensor"])
def test_activations_that_we_round_otherwise_need_a_choice(name, tmp_path):
    tensors, expected, metadata = split(GOLDEN / f"{name}.safetensors")
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(
        ValueError, match=r"0.weight must have activations that are rounded per row"
    ):
        load_torchao(net(), path)
    for act_bits, spec in ((8, "w8a8"), (16, "w8")):
        model = net()
        assert set(load_torchao(model, path, act_bits=act_bits).quantized.values()) == {spec}
        assert torch.equal(model[0].dequantized(), expected["0"])


def test_zero_points():
    tensors, _, _ = split(GOLDEN / "rows.safetensors")
    state = in_memory(GOLDEN / "rows.safetensors")
    state["0.weight"].zero_point = torch.arange(-4, 5, dtype=torch.int8).view(9, 1)
    model = net()
    report = load_torchao(model, state)
    assert report.quantized == {"0": "w8-asym", "2": "w8"}
    codes, scale = tensors["0._weight_qdata"], tensors["0._weight_scale"]
    zero_point = state["0.weight"].zero_point
    assert torch.equal(model[0].dequantized(), scale * (codes.float() - zero_point))


def altered(path, **changes):
    state = in_memory(path)
    for key, value in changes.items():
        setattr(state["0.weight"], key, value)
    return state


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"act_pre_scale": torch.ones(64)}, "0.weight must have no act_pre_scale, got one"),
        (
            {"block_size": [1, 16]},
            r"0.weight must share scales along a row, .* got blocks of \[1, 1",
        ),
        ({"block_size": [3, 64]}, r"0.weight must share .* got blocks of \[3, 64\] in \[9, 64\]"),
        ({"scale": torch.full((9, 1), float("inf"))}, "0.scale must be finite, got 9 values"),
    ],
)
def test_refuses_what_has_no_exact_counterpart(change, text):
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"load_torchao: {text}"):
        load_torchao(model, altered(GOLDEN / "rows.safetensors", **change))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_refuses_other_subclasses_files_and_models(tmp_path):
    class Float8Tensor(Int8Tensor):
        pass

    state = in_memory(GOLDEN / "rows.safetensors")
    weight = state["0.weight"]
    attributes = vars(weight)
    state["0.weight"] = Float8Tensor(dtype=torch.float32, **attributes)
    with pytest.raises(
        ValueError, match=r"0.weight must be an Int8Tensor or plain, got Float8Tens"
    ):
        load_torchao(net(), state)
    with pytest.raises(
        ValueError, match=r"source must hold integer weights .* got 0 that are none"
    ):
        load_torchao(net(), net().state_dict())
    with pytest.raises(ValueError, match=r"act_bits must be 16, 8 or None, got 4"):
        load_torchao(net(), in_memory(GOLDEN / "rows.safetensors"), act_bits=4)
    with pytest.raises(
        ValueError, match=r"load_torchao: model must have the architecture .* got 1.bias of shape"
    ):
        load_torchao(
            nn.Sequential(*net()[:1], nn.LayerNorm(8), net()[2]),
            in_memory(GOLDEN / "rows.safetensors"),
        )
    tensors, _, metadata = split(GOLDEN / "rows.safetensors")
    del tensors["0._weight_scale"]
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    with pytest.raises(
        ValueError, match=r"0.weight must have qdata and scale in the file, got \['q"
    ):
        load_torchao(net(), tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError, match=r"load_torchao: path must be a safetensors file"):
        load_torchao(net(), tmp_path / "none.safetensors")
