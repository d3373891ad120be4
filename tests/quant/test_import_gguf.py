# SPDX-License-Identifier: Apache-2.0
"""Files that the gguf package writes, and what it dequantizes."""

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import nn

from zo_kernels.nn import QuantConv2d, QuantLinear
from zo_kernels.quant import dequantize, load_quantized, save_quantized
from zo_kernels.quant.imports import GGUF, load_gguf

QUANTIZED = {Type.Q8_0: "w8-g32", Type.Q4_0: "w4-g32"}


def net(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleDict(
            {
                "embed": nn.Embedding(10, 64),
                "first": nn.Linear(64, 96),
                "norm": nn.LayerNorm(96),
                "last": nn.Linear(96, 5, bias=False),
                "conv": nn.Conv2d(3, 4, 3),
                "point": nn.Conv2d(32, 6, 1),
            }
        ).to(dtype)


def write(path, tensors, metadata=()):
    """tensors: name -> (values, type); the package's own writer and quantizer."""
    writer = gguf.GGUFWriter(path, "test")
    for add in metadata:
        add(writer)
    expected = {}
    for name, (values, kind) in tensors.items():
        data = gguf.quants.quantize(np.asarray(values), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        expected[name] = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def kinds_of(state, kind):
    """Matrices whose rows are whole blocks take `kind`, the others types of floats in turn."""
    floats = iter([Type.F32, Type.F16, Type.BF16] * 4)
    return {
        name: (value.numpy(), kind if value.dim() == 2 else next(floats))
        for name, value in state.items()
    }


@pytest.fixture(params=QUANTIZED, ids=lambda kind: kind.name)
def case(request, tmp_path):
    """(type, path, what gguf dequantizes)."""
    path = tmp_path / "model.gguf"
    return request.param, path, write(path, kinds_of(net().state_dict(), request.param))


@pytest.mark.parametrize("act_bits", [16, 8])
def test_weights_are_bit_for_bit_what_gguf_dequantizes(case, act_bits):
    kind, path, expected = case
    model = net().to("meta")
    report = load_gguf(model, path, act_bits=act_bits)
    spec = QUANTIZED[kind].replace("-", "a8-" if act_bits == 8 else "-")
    assert report.quantized == {"first": spec, "last": spec}
    assert report.skipped == {"embed": "no integer module for Embedding"}
    assert type(model["first"]) is QuantLinear
    for name in report.quantized:
        assert torch.equal(dequantize(model[name]), expected[f"{name}.weight"])
    for name in ("embed.weight", "norm.weight", "first.bias", "conv.weight", "conv.bias"):
        assert torch.equal(model.state_dict()[name], expected[name])
    assert model["last"](model["norm"](model["first"](torch.ones(2, 64)))).isfinite().all()


def test_q4_0_has_all_16_codes_and_negative_scales(tmp_path):
    """ggml's scale has the opposite sign of the extreme weight, which is code -8."""
    path = tmp_path / "m.gguf"
    rows = torch.linspace(-1, 2, 64).repeat(3, 1)
    expected = write(path, {"0.weight": (rows.numpy(), Type.Q4_0)})
    model = nn.Sequential(nn.Linear(64, 3, bias=False))
    load_gguf(model, path)
    assert model[0].codes().min() == -8 and (model[0].scale < 0).any()
    assert model[0].headroom == 0
    assert torch.equal(dequantize(model[0]), expected["0.weight"])


def test_saved_and_loaded_again(case, tmp_path):
    _, path, _ = case
    model = net(torch.bfloat16)
    load_gguf(model, path)
    assert model["first"].bias.dtype == torch.bfloat16
    save_quantized(model, tmp_path / "ours.safetensors")
    loaded = load_quantized(net().to("meta"), tmp_path / "ours.safetensors")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_shapes_that_comfyui_cuts_anew(tmp_path):
    """Rows that 256 does not divide are written as rows of 256, with the shape in the metadata."""
    model, path = net(), tmp_path / "m.gguf"
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    state["conv.weight"] = np.resize(np.linspace(-1, 1, 999, dtype=np.float32), (64, 3, 3, 4))
    model["conv"] = nn.Conv2d(3, 64, (3, 4))
    state["conv.bias"] = np.zeros(64, np.float32)
    cut = {"first.weight": (24, 256), "point.weight": (2, 96), "conv.weight": (9, 256)}
    tensors = {k: (v, Type.F32) for k, v in state.items()}
    tensors |= {k: (state[k].reshape(shape), Type.Q8_0) for k, shape in cut.items()}

    def shapes(writer):
        for name in cut:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(state[name].shape))

    expected = write(path, tensors, [shapes])
    report = load_gguf(model, path)
    assert report.quantized == {"first": "w8-g32", "point": "w8-g32"}
    assert report.skipped == {"conv": "its blocks do not run over input channels"}
    assert type(model["point"]) is QuantConv2d
    for name in ("first", "point"):
        shape = state[f"{name}.weight"].shape
        assert torch.equal(dequantize(model[name]), expected[f"{name}.weight"].reshape(shape))
    assert torch.equal(model["conv"].weight, expected["conv.weight"].reshape(64, 3, 3, 4))


def test_names_of_another_program(case, tmp_path):
    kind, _, _ = case
    path = tmp_path / "other.gguf"
    state = {f"model.{k}": v for k, v in net().state_dict().items()} | {"old": torch.ones(3)}
    write(path, kinds_of(state, kind))

    def rename(name):
        return name.removeprefix("model.") if name.startswith("model.") else None

    one, other = net(), net()
    load_gguf(one, path, rename=rename)
    names = {name: rename(name) for name in state if rename(name)}
    with pytest.raises(ValueError, match=r"load_gguf: model must .* got old of shape \(3,\) where"):
        load_gguf(other, path, rename=names)
    load_gguf(other, path, rename=lambda name: names.get(name))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
    with pytest.raises(
        ValueError, match="rename must give every tensor a name of its own, got 'a'"
    ):
        load_gguf(net(), path, rename=lambda name: "a")


def test_reader_against_the_package(case):
    _, path, _ = case
    ours, theirs = GGUF(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.kind == tensor.tensor_type.name and mine.offset == tensor.data_offset
        assert mine.shape == tuple(int(n) for n in tensor.shape[::-1])
    assert ours.metadata["general.architecture"] == "test"


def test_metadata_of_every_type(tmp_path):
    values = {
        "uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 2**31, "int32": -70000,
        "uint64": 2**63, "int64": -(2**40), "float32": 0.5, "float64": 0.1, "bool": True,
        "string": "grüße",
    }  # fmt: skip

    def add(writer):
        for kind, value in values.items():
            getattr(writer, f"add_{kind}")(f"x.{kind}", value)
        writer.add_array("x.array", [1, 2, 3])
        writer.add_array("x.words", ["a", "bc"])
        writer.add_custom_alignment(128)

    path = tmp_path / "m.gguf"
    expected = write(path, {"a": (np.ones((3, 5), np.float32), Type.F32)}, [add])
    file = GGUF(path)
    assert {k.removeprefix("x."): v for k, v in file.metadata.items() if k.startswith("x.")} == {
        **values, "array": [1, 2, 3], "words": ["a", "bc"]
    }  # fmt: skip
    assert file.tensors["a"].offset % 128 == 0
    assert torch.equal(file.values("a"), expected["a"])


def test_integer_tensors_and_doubles(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "test")
    arrays = {
        np.dtype(t).name: np.arange(6, dtype=t).reshape(2, 3)
        for t in (np.int8, np.int16, np.int32, np.int64, np.float64, np.float16)
    }
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, array in arrays.items():
        assert torch.equal(GGUF(path).values(name), torch.from_numpy(array))


def test_types_that_have_no_counterpart_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, {"0.weight": (np.ones((3, 64), np.float32), Type.Q5_0)})
    with pytest.raises(ValueError, match=r"GGUF: 0.weight must be one of F32, .* got type 6 in"):
        load_gguf(nn.Sequential(nn.Linear(64, 3, bias=False)), path)


def test_scales_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, {"0.weight": (np.ones((3, 64), np.float32), Type.Q8_0)})
    data = bytearray(path.read_bytes())
    start = GGUF(path).tensors["0.weight"].offset
    data[start : start + 2] = struct.pack("<e", float("inf"))
    path.write_bytes(data)
    model = nn.Sequential(nn.Linear(64, 3, bias=False))
    with pytest.raises(ValueError, match=r"load_gguf: 0.scale must be finite, got 1 values"):
        load_gguf(model, path)
    assert type(model[0]) is nn.Linear


def damaged(data, start, patch):
    return data[:start] + patch + data[start + len(patch) :]


DAMAGE = {
    "magic": (lambda d: b"GGML" + d[4:], "be a GGUF file"),
    "empty": (lambda d: b"", "be a GGUF file"),
    "version": (
        lambda d: damaged(d, 4, struct.pack("<I", 1)),
        r"have version 2 or 3, .*\(version 1\)",
    ),
    "big endian": (
        lambda d: damaged(d, 4, struct.pack(">I", 3)),
        r"have version 2 or 3, little endian, .*big-endian",
    ),
    "tensors": (lambda d: damaged(d, 8, struct.pack("<Q", 2**60)), "be a whole file"),
    "pairs": (lambda d: damaged(d, 16, struct.pack("<Q", 2**60)), "be a whole file"),
    "name": (lambda d: damaged(d, 24, struct.pack("<Q", 2**62)), r"be a whole file, .*\(a text of"),
    "data": (lambda d: d[:-200], "be a whole file, .*weight beyond its"),
    "header": (lambda d: d[:60], "be a whole file"),
    "table": (lambda d: d[: d.index(b"last.weight") + 14], "be a whole file"),
    "text": (lambda d: d.replace(b"general.architecture", b"\xff" * 20), "be a whole file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(case, damage):
    _, path, _ = case
    change, text = DAMAGE[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"GGUF: path must {text}"):
        load_gguf(net(), path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, {"0.weight": (np.ones((3, 64), np.float32), Type.Q4_0)})
    data = path.read_bytes()
    end = GGUF(path).tensors["0.weight"].offset + 3 * 2 * 18
    for length in range(0, end, 7):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="GGUF: path must be a"):
            GGUF(path)


def test_files_that_do_not_fit(case, tmp_path):
    _, path, _ = case
    with pytest.raises(FileNotFoundError, match="GGUF: path must be a file, got"):
        load_gguf(net(), tmp_path / "none.gguf")
    model = net()
    model["first"] = nn.Linear(32, 96)
    with pytest.raises(
        ValueError, match=r"got first with a weight of \(96, 64\) where the model ha"
    ):
        load_gguf(model, path)
    with pytest.raises(ValueError, match="load_gguf: act_bits must be 16, 8 or None, got 4"):
        load_gguf(net(), path, act_bits=4)
