# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from zo_kernels.quant import QuantConfig, absmax, quantize_, quantize_checkpoint
from zo_kernels.quant.rounding import ROUNDINGS

CONFIG = QuantConfig("w4a8-g32", "mse", skip=("conv_out",), overrides={"mid_block.*": "w8"})


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 5)
        )
        model.register_buffer("kept", torch.arange(3))
        return model


@pytest.fixture
def saved(tmp_path):
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def assert_same(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype, name
    assert not any(t.is_meta for t in first.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_load_then_quantize(saved, dtype):
    model = net().to(dtype)
    config = QuantConfig("w8a8", "mse", headroom=2, overrides={"3": "w4"})
    expected = quantize_(model, config)
    empty = net().to(dtype).to("meta")
    report = quantize_checkpoint(empty, saved, config)
    assert report == expected
    assert_same(empty, model)


def test_unet_folder(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    with init_empty_weights():
        empty = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tmp_path))
    config = QuantConfig(
        CONFIG.spec, CONFIG.rounding, CONFIG.skip, CONFIG.overrides, fallback="w8a8"
    )
    report = quantize_checkpoint(empty, tmp_path, config)
    assert set(report.quantized.values()) == {"w4a8-g32", "w8", "w8a8"}
    quantize_(unet, config)
    assert_same(empty, unet)


def test_sharded_checkpoint(unet, tmp_path):
    unet.save_pretrained(tmp_path, max_shard_size="300KB")
    index = next(tmp_path.glob("*.index.json"))

    def make():
        with init_empty_weights():
            return UNet2DConditionModel.from_config(unet.config)

    for path in (tmp_path, index):
        empty = make()
        quantize_checkpoint(empty, path)
        assert not any(t.is_meta for t in empty.state_dict().values())
    quantize_(unet)
    assert_same(empty, unet)
    shard = min(tmp_path.glob("*-00001-of-*.safetensors"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"must have all its files, got .*{shard.name}"):
        quantize_checkpoint(make(), tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="path must be an index with a weight_map"):
        quantize_checkpoint(make(), tmp_path)


def test_one_float_weight_is_alive_at_a_time(saved, monkeypatch):
    seen, alive = [], []

    def watching(weight, *args):
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(weight))
        return absmax(weight, *args)

    monkeypatch.setitem(ROUNDINGS, "absmax", watching)
    quantize_checkpoint(net().to("meta"), saved)
    assert alive == [0, 0] and seen[-1]() is None


MEMORY = """
import re, sys
from pathlib import Path
from torch import nn
from zo_kernels.quant import quantize_checkpoint

def status(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def wide(count):
    return nn.Sequential(*(nn.Linear(1024, 2048, device="meta") for _ in range(count)))

large, small = sys.argv[1:]
quantize_checkpoint(wide(1), small)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; mapped pages count
model = wide(24)
quantize_checkpoint(model, large)
print(status("VmHWM") - before)
"""


def test_memory_is_that_of_the_integers_and_a_few_layers(tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process can be reset on Linux only")
    large, small = tmp_path / "large.safetensors", tmp_path / "small.safetensors"
    shapes = {"weight": (2048, 1024), "bias": (2048,)}
    weights = {f"{i}.{key}": torch.randn(shapes[key]) for i in range(24) for key in shapes}
    save_file(weights, large)
    save_file({key: weights[key] for key in ("0.weight", "0.bias")}, small)
    command = [sys.executable, "-c", MEMORY, str(large), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    layer = weights["0.weight"].nbytes
    assert int(done.stdout) < 24 * layer / 4 + 4 * layer  # 84 MB where the float model has 201


def test_tied_weights_stay_tied(tmp_path):
    def tied():
        model = nn.ModuleDict(
            {"embed": nn.Embedding(5, 4), "mid": nn.Linear(4, 4), "head": nn.Linear(4, 5, False)}
        )
        model["head"].weight = model["embed"].weight
        return model

    model = tied()
    for stored in ("embed.weight", "head.weight"):
        state = model.state_dict()
        kept = {k: v for k, v in state.items() if "mid" in k or k == stored}
        save_file(kept, tmp_path / "m.safetensors")
        empty = tied()
        empty.to("meta")
        empty["head"].weight = empty["embed"].weight
        report = quantize_checkpoint(empty, tmp_path / "m.safetensors")
        assert report.skipped == {"head": "its weight is shared with embed"}
        assert empty["head"].weight is empty["embed"].weight
        assert torch.equal(empty["embed"].weight, model["embed"].weight)


def test_ignored_names(saved):
    save_file({**load_file(saved), "old.position_ids": torch.arange(4)}, saved)
    with pytest.raises(
        ValueError, match=r"got old.position_ids of shape \(4,\) where the model has n"
    ):
        quantize_checkpoint(net().to("meta"), saved)
    model = net().to("meta")
    quantize_checkpoint(model, saved, ignore=("*.position_ids",))
    assert not any(t.is_meta for t in model.state_dict().values())


BAD = {
    "missing": (
        {"3.bias": None},
        {},
        r"model must have the architecture of .* 3.bias of shape none",
    ),
    "missing weight": ({"0.weight": None}, {}, r"got 0.weight of shape none where the model has"),
    "shape": ({"0.weight": torch.ones(4, 3, 3, 1)}, {}, r"got 0.weight of shape \(4, 3, 3, 1\) wh"),
    "integers": ({"0.weight": torch.ones(4, 3, 3, 3).char()}, {}, "0.weight must be floating, got"),
    "group": ({}, {"spec": "w4-g32"}, "quantize_checkpoint: spec must fit every layer, got 2"),
    "pattern": ({}, {"skip": ("x",)}, "quantize_checkpoint: pattern must match"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_before_anything_changes(saved, case):
    changes, config, text = BAD[case]
    state = {k: v for k, v in {**load_file(saved), **changes}.items() if v is not None}
    save_file(state, saved)
    model = net().to("meta")
    with pytest.raises((ValueError, TypeError), match=text):
        quantize_checkpoint(model, saved, QuantConfig(**config))
    assert type(model[0]) is nn.Conv2d and all(t.is_meta for t in model.state_dict().values())


def test_values_that_are_not_finite_are_named(saved):
    state = load_file(saved)
    state["3.weight"][1, 2] = float("inf")
    save_file(state, saved)
    with pytest.raises(
        ValueError, match=r"quantize_checkpoint: 3.weight must be finite, got 1 val"
    ):
        quantize_checkpoint(net().to("meta"), saved)


def test_paths(saved, tmp_path):
    model = net().to("meta")
    for path in (tmp_path / "none", tmp_path / "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="quantize_checkpoint: path must be a safetens"):
            quantize_checkpoint(model, path)
    saved.with_name("other.safetensors").write_bytes(saved.read_bytes())
    with pytest.raises(
        ValueError, match=r"tell which of several .*model.safetensors, other.safete"
    ):
        quantize_checkpoint(model, tmp_path)
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(ValueError, match="path must be a whole safetensors file"):
        quantize_checkpoint(model, saved)
    (tmp_path / "folder" / f"m{'.safetensors.index.json'}").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="path must be an index with a weight_map"):
        quantize_checkpoint(model, tmp_path / "folder")
