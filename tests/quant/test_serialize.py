# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from zo_kernels.nn import QuantLinear
from zo_kernels.quant import QuantConfig, load_quantized, quantize_, save_quantized


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 5))


@pytest.fixture
def saved(tmp_path):
    """(quantized model, its file)."""
    model = net()
    quantize_(model)
    save_quantized(model, tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


SPECS = ("w8", "w8-asym", "w4", "w4-asym", "w8a8", "w4a8")
GOLDEN = Path(__file__).parents[1] / "golden" / "quantized_v1.safetensors"


def assert_same_model(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype, name
        assert tensor.stride() == other.stride(), name
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
    for one, other in zip(a.modules(), b.modules(), strict=True):
        assert getattr(one, "headroom", 0) == getattr(other, "headroom", 0)


@pytest.mark.parametrize("skeleton", ["float", "meta", "quantized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_bit_equal(tmp_path, skeleton, dtype):
    model = net()
    quantize_(model, QuantConfig(skip=("3",)))
    model.to(dtype)
    save_quantized(model, tmp_path / "m.safetensors")
    empty = net()
    if skeleton == "meta":
        empty.to("meta")
    if skeleton == "quantized":
        quantize_(empty)
        with pytest.raises(ValueError, match=r"got 3 in float or not at all where the model has i"):
            load_quantized(empty, tmp_path / "m.safetensors")
        empty = net()
        quantize_(empty, QuantConfig(skip=("3",)))
    loaded = load_quantized(empty, tmp_path / "m.safetensors")
    assert loaded is empty
    assert_same_model(loaded, model)
    assert loaded[0].weight.dtype == dtype
    x = torch.ones(2, 3, 5, 5, dtype=dtype)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("spec", SPECS)
def test_every_spec_round_trips(tmp_path, spec):
    model = net()
    quantize_(model, QuantConfig(spec, "mse"))
    save_quantized(model, tmp_path / "m.safetensors")
    assert_same_model(load_quantized(net().to("meta"), tmp_path / "m.safetensors"), model)


@pytest.mark.parametrize("spec", ["w4-g32", "w8a8-g64", "w4a8-g128-asym"])
def test_groups_and_mixed_specs_round_trip(tmp_path, spec):
    def wide():
        return nn.Sequential(
            nn.Conv2d(3, 128, 3), nn.Conv2d(128, 5, (3, 1)), nn.Linear(7, 3, False)
        )

    model = wide()
    quantize_(model, QuantConfig(spec, overrides={"0": "w4"}, fallback="w8a8"))
    save_quantized(model, tmp_path / "m.safetensors")
    assert_same_model(load_quantized(wide(), tmp_path / "m.safetensors"), model)


def test_the_file_holds_logical_codes(tmp_path):
    model = net()
    quantize_(model, QuantConfig(overrides={"3": "w4-asym"}))
    save_quantized(model, tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")
    assert set(stored) == {
        *("0.codes", "0.scale", "0.bias", "1.weight", "1.bias"),
        *("3.codes", "3.scale", "3.zero_point", "3.bias"),
    }
    assert torch.equal(stored["0.codes"], model[0].codes())
    rows = stored["3.codes"]
    assert rows.dtype == torch.uint8 and rows.shape == (5, 18)
    assert torch.equal((rows & 15).char() - 8, model[3].codes()[:, ::2])
    assert torch.equal((rows >> 4).char() - 8, model[3].codes()[:, 1::2])
    assert torch.equal(stored["3.zero_point"], model[3].zero_point)


def test_files_of_version_1_load():
    """One that version 0.1.0 wrote: a module under two names, bf16 activations."""
    stored = load_file(GOLDEN)
    model = nn.Sequential(*net(), nn.Linear(5, 5, bias=False)).to("meta")
    model.add_module("again", model[4])
    load_quantized(model, GOLDEN)
    for name in ("0", "3", "4"):
        layer = model.get_submodule(name)
        assert torch.equal(layer.codes(), stored[f"{name}.qweight"])
        assert torch.equal(layer.scale, stored[f"{name}.scale"])
        assert layer.weight.dtype == torch.bfloat16 and str(layer.spec) == "w8"
    assert torch.equal(model[0].bias, stored["0.bias"])
    assert model.again is model[4]


def test_a_module_under_two_names_is_stored_once_and_stays_one(tmp_path):
    def shared():
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        model.add_module("again", model[0])
        return model

    model = shared()
    quantize_(model)
    save_quantized(model, tmp_path / "m.safetensors")
    assert set(load_file(tmp_path / "m.safetensors")) == {"0.codes", "0.scale", "0.bias"}
    loaded = load_quantized(shared().to("meta"), tmp_path / "m.safetensors")
    assert loaded.again is loaded[0]
    assert_same_model(loaded, model)


def test_every_dtype_is_written_as_the_library_reads_it(tmp_path):
    model = net()
    for i, dtype in enumerate((torch.bool, torch.int64, torch.float64, torch.float8_e4m3fn)):
        model.register_buffer(f"b{i}", torch.tensor([[1, 0], [3, 2]]).to(dtype).t())
    model.register_buffer("scalar", torch.tensor(2.5))
    model.register_buffer("empty", torch.ones(0, 3))
    quantize_(model)
    save_quantized(model, tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")
    for name, buffer in model.named_buffers(recurse=False):
        assert stored[name].dtype == buffer.dtype and stored[name].shape == buffer.shape
        assert torch.equal(stored[name].double(), buffer.double())
    model.register_buffer("c", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"save_quantized: c must have a dtype that safetensors st"):
        save_quantized(model, tmp_path / "n.safetensors")
    assert os.listdir(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize("spec", ["w8", "w4a8-g64"])
def test_neither_saving_nor_loading_holds_the_model_twice(tmp_path, extra_memory, spec):
    def wide():
        return nn.Sequential(*(nn.Linear(1024, 2048, device="meta") for _ in range(32)))

    model = nn.Sequential(*(QuantLinear.like(layer, "cpu", spec=spec) for layer in wide()))
    size = sum(buffer.nbytes for buffer in model.buffers())
    path = tmp_path / "m.safetensors"
    save_quantized(model[:1], path)
    load_quantized(wide()[:1].to_empty(device="cpu"), path)  # what the libraries load once
    assert extra_memory(partial(save_quantized, model, path)) < 0.3 * size
    del model
    kept = []

    def load():
        skeleton = wide()
        for layer in skeleton:
            layer.bias = nn.Parameter(torch.zeros(2048))
        kept.append(load_quantized(skeleton, path))

    assert extra_memory(load) < 1.3 * size


def test_unet_round_trip(unet, tmp_path):
    quantize_(unet, QuantConfig(skip=("conv_out",)))
    save_quantized(unet, tmp_path / "unet.safetensors")
    with init_empty_weights():
        empty = UNet2DConditionModel.from_config(unet.config)
    assert_same_model(load_quantized(empty, tmp_path / "unet.safetensors"), unet)


def test_text_encoder_round_trip(text_encoder, tmp_path):
    quantize_(text_encoder)
    save_quantized(text_encoder, tmp_path / "text.safetensors")
    with init_empty_weights():
        empty = CLIPTextModel(text_encoder.config)
    loaded = load_quantized(empty.eval(), tmp_path / "text.safetensors")
    ids = torch.arange(16).view(1, 16)
    assert torch.equal(loaded(ids)[0], text_encoder(ids)[0])


def test_header_tells_the_config_and_the_layers(tmp_path):
    model = net()
    config = QuantConfig(rounding="mse", skip=("3",), headroom=3, fallback="w8a8")
    quantize_(model, config)
    save_quantized(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        header = json.loads(file.metadata()["zo_kernels"])
    assert QuantConfig.from_dict(header["config"]) == config
    assert header["version"] == 2 and header["layers"] == {"0": ["w8", "float32"]}
    loaded = load_quantized(net(), tmp_path / "m.safetensors")
    save_quantized(loaded, tmp_path / "again.safetensors")
    one, two = (tmp_path / name for name in ("m.safetensors", "again.safetensors"))
    assert one.read_bytes() == two.read_bytes()


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    def tied():
        model = nn.ModuleDict(
            {"embed": nn.Embedding(5, 4), "mid": nn.Linear(4, 4), "head": nn.Linear(4, 5, False)}
        )
        model["head"].weight = model["embed"].weight
        return model

    model = tied()
    quantize_(model)
    save_quantized(model, tmp_path / "m.safetensors")
    assert "head.weight" not in load_file(tmp_path / "m.safetensors")
    loaded = load_quantized(tied(), tmp_path / "m.safetensors")
    assert loaded["head"].weight is loaded["embed"].weight
    assert_same_model(loaded, model)


def test_replaces_an_older_file_with_the_usual_permissions(saved):
    model, path = saved
    old = path.read_bytes()
    with torch.no_grad():
        model[1].weight.fill_(3)
    save_quantized(model, path)
    assert path.read_bytes() != old
    assert os.listdir(path.parent) == [path.name]
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_disk_that_fills_up_leaves_no_half_written_file(saved):
    model, path = saved
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        for target in (path, path.with_name("new.safetensors")):
            with pytest.raises(OSError, match="save_quantized: path must be a file that can be wr"):
                save_quantized(model, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() == old


@pytest.mark.parametrize("fail", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_the_old_file(saved, monkeypatch, fail):
    model, path = saved
    old = path.read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, fail, refuse)
    with pytest.raises(OSError, match=r"save_quantized: path must be .*No space left on device"):
        save_quantized(model, path)
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() == old


def test_save_refuses(saved, tmp_path):
    model, _ = saved
    with pytest.raises(OSError, match=r"save_quantized: path must be .*missing.*m.safetensors"):
        save_quantized(model, tmp_path / "missing" / "m.safetensors")
    with pytest.raises(ValueError, match=r"save_quantized: model must contain quantized modules"):
        save_quantized(net(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"got a QuantLinear that is one: put it into a container"):
        save_quantized(model[3], tmp_path / "m.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"save_quantized: path must be a file"):
        save_quantized(model, tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["folder", "model.safetensors"]


def rewrite(path, tensors=None, **fields):
    """Replace some tensors and header fields of the file at `path`; None removes one."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["zo_kernels"])
    header = {k: v for k, v in {**header, **fields}.items() if v is not None}
    kept = {k: v for k, v in {**load_file(path), **(tensors or {})}.items() if v is not None}
    save_file(kept, path, {"zo_kernels": json.dumps(header)})


BAD_FILES = {
    "header": (
        {"layers": None},
        r"path must have the header of save_quantized, got .* \(fields \['config', 'tied', 'vers",
    ),
    "version": (
        {"version": 4},
        r"path must have layout version 1 or 2 or 3, .* \(version 4\); a newer zo_kernels wrote",
    ),
    "config": ({"config": {"bits": 8}}, r"values must hold known fields, got \['bits'\]"),
    "spec": ({"layers": {"0": ["w5", "float32"]}}, "spec must be w8, w4, .* got 'w5'"),
    "missing tensor": (
        {"tensors": {"0.scale": None}},
        r"got 0.scale of shape none where the model has \(4,\)",
    ),
    "extra tensor": (
        {"tensors": {"9.weight": torch.ones(2)}},
        r"got 9.weight of shape \(2,\) where the model has none",
    ),
    "shape": (
        {"tensors": {"3.codes": torch.zeros(5, 35, dtype=torch.int8)}},
        r"got 3.codes of shape \(5, 35\) where the model has \(5, 36\)",
    ),
    "dtype": (
        {"tensors": {"3.codes": torch.zeros(5, 36)}},
        "got 3.codes of torch.float32 in place of torch.int8",
    ),
    "scale": (
        {"tensors": {"3.scale": torch.full((5,), float("nan"))}},
        "load_quantized: 3.scale must be finite, got 5 values that are NaN or infinite",
    ),
    "bits": (
        {"layers": {"0": ["w4", "float32"], "3": ["w8", "float32"]}},
        r"got 0.codes of shape \(4, 3, 3, 3\) where the model has \(4, 14\)",
    ),
    "zero point": (
        {"layers": {"0": ["w8-asym", "float32"], "3": ["w8", "float32"]}},
        r"got 0.zero_point of shape none where the model has \(4,\)",
    ),
    "group": (
        {
            "layers": {"3": ["w8-g32", "float32"]},
            "tensors": {"3.scale": torch.ones(5, 1)},
        },
        r"got 3 as w8-g32, where groups of 32 do not divide its 36 input channels",
    ),
    "layer in float": (
        {"layers": {"0": ["w8", "float32"]}},
        r"got 3.bias|got 3.codes of shape \(5, 36\) where the model has none",
    ),
    "kind": (
        {"layers": {"1": ["w8", "float32"]}},
        "got 1 quantized, which is GroupNorm there",
    ),
    "unknown layer": (
        {"layers": {"7": ["w8", "float32"]}},
        "got 7 quantized, which is NoneType there",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_do_not_fit_change_nothing(saved, case):
    change, text = BAD_FILES[case]
    _, path = saved
    rewrite(path, **change)
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=text):
        load_quantized(model, path)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_load_refuses_damaged_and_missing_files(saved):
    _, path = saved
    with pytest.raises(FileNotFoundError, match="load_quantized: path must be a file, got"):
        load_quantized(net(), path.with_name("none.safetensors"))
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(
        ValueError, match=r"have the header of save_quantized, got .*\(no such header"
    ):
        load_quantized(net(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="load_quantized: path must be a whole safetensors file"):
        load_quantized(net(), path)


def test_load_refuses_buffers_that_nobody_fills(saved):
    _, path = saved
    model = net().to("meta")
    model.register_buffer("positions", torch.ones(3, device="meta"), persistent=False)
    with pytest.raises(ValueError, match="must hold values for positions, which no file stores"):
        load_quantized(model, path)
