# SPDX-License-Identifier: Apache-2.0
"""Models that come part by part: the same bits as the whole pipeline's, never two that need not."""

import json
import logging
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona.base import load_base, open_base, quantize
from persona.cli import COMMANDS, load_method, main
from persona.config import RunConfig
from persona.errors import UserError
from persona.families import StableDiffusion, StableDiffusionPipeline, at_a_time, load_pipeline
from persona.parts import MODELS, Parts
from persona.train import train
from zo_kernels.nn import QuantModule


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy that the test may change."""
    return shutil.copytree(model_folder, tmp_path / "model")


def config(folder, **options):
    return RunConfig(pretrained_model_name_or_path=str(folder), device="cpu", **options)


def whole(given):
    """The same model, read by diffusers and rounded in memory."""
    family = StableDiffusion(load_pipeline(given.pretrained_model_name_or_path))
    quantize(given, family)
    return family


def assert_same(a, b):
    for name in MODELS:
        mine, other = (getattr(family.pipe, name) for family in (a, b))
        assert not mine.training and not any(p.requires_grad for p in mine.parameters())
        assert [type(m) for m in mine.modules()] == [type(m) for m in other.modules()]
        mine, other = mine.state_dict(), other.state_dict()
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_precision": "int8"},
        {"base_precision": "int4"},
        {"base_precision": "as-loaded"},
    ],
    ids=str,
)
def test_the_bits_of_the_whole_pipeline(model_folder, options):
    given = config(model_folder, **options)
    assert_same(load_base(given), whole(given))


def test_several_files_and_half_precision(folder):
    pipe = load_pipeline(str(folder), torch.float16)
    pipe.save_pretrained(folder)
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert_same(load_base(config(folder)), whole(config(folder)))


def rename(file, rule):
    """Write a model's file anew, its tensors under other names."""
    save_file({rule(k): v for k, v in load_file(file).items()}, file, {"format": "pt"})


def test_names_of_older_files(folder, caplog):
    """Those of Stable Diffusion 1.5, as it was published: its text encoder's and its VAE's."""
    expected = whole(config(folder))
    rename(folder / "text_encoder" / "model.safetensors", lambda key: f"text_model.{key}")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(key):
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        return key

    rename(folder / "vae" / "diffusion_pytorch_model.safetensors", older)
    with caplog.at_level(logging.INFO, "persona.parts"):
        assert_same(load_base(config(folder)), expected)
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(" is read whole")[0] for line in told] == ["text_encoder", "vae"]


def test_parts_come_when_asked_for_and_leave(model_folder):
    family = open_base(config(model_folder))
    assert family.resolution == 64 and family.device == torch.device("cpu")
    assert all(getattr(family.pipe, name) is None for name in MODELS)
    pixels = torch.rand(1, 3, 64, 64)
    first = family.encode_images(pixels)
    assert family.pipe.unet is None
    family.release("vae")
    assert family.pipe.vae is None
    assert all(map(torch.equal, first, family.encode_images(pixels)))
    picture = family.sample(["a toy"], seed=0, steps=2, guidance=2.0)[0]
    assert picture.size == (64, 64)
    assert family.sample([], seed=0, steps=2, guidance=2.0) == []


def test_what_is_given_whole_stays(fresh_pipeline):
    family = StableDiffusion(fresh_pipeline())
    family.release("vae", "unet")
    assert family.vae is not None and family.unet is not None


def test_a_run_never_has_vae_and_unet_together(command, monkeypatch):
    family, loaded, load = None, [], Parts.load

    def watch(parts, name):
        loaded.append((name, sorted(m for m in MODELS if getattr(family.pipe, m) is not None)))
        return load(parts, name)

    def opened(given):
        nonlocal family
        family = open_base(given)
        return family

    monkeypatch.setattr(Parts, "load", watch)
    monkeypatch.setattr("persona.train.open_base", opened)
    assert main(command(max_train_steps=1, num_validation_images=1)) == 0
    assert loaded == [
        ("vae", []),
        ("text_encoder", []),
        ("unet", ["text_encoder"]),
        ("vae", []),
    ]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("ti", {}),
        ("scales", {"method": "tuneqdm"}),
        ("scales", {"method": "s2", "optimizer": "zo"}),
        ("dreambooth", {}),
        ("selective", {"strategy": "zo-high"}),
    ],
)
def test_nothing_holds_the_unet_when_pictures_are_decoded(short_run, monkeypatch, method, more):
    alive, decode = [], StableDiffusion.decode

    def watched(family, latents):
        alive.append(unet() is not None)
        return decode(family, latents)

    def load(parts, name):
        nonlocal unet
        model = real(parts, name)
        if name == "unet":
            unet = weakref.ref(model)
        return model

    unet, real = None, Parts.load
    monkeypatch.setattr(Parts, "load", load)
    monkeypatch.setattr(StableDiffusion, "decode", watched)
    command = COMMANDS[method]
    options = short_run | {"max_train_steps": 1, "num_validation_images": 1} | more
    train(load_method(command.method), command.config(**options), progress=False)
    assert alive == [False, False]


def test_a_hub_id_is_fetched(model_folder, monkeypatch):
    asked = []

    def download(name, **without):
        asked.append((name, without["safety_checker"]))
        return str(model_folder)

    monkeypatch.setattr(StableDiffusionPipeline, "download", download)
    family = load_base(config("somebody/some-model"))
    assert asked == [("somebody/some-model", None)]
    assert any(isinstance(m, QuantModule) for m in family.unet.modules())


def broken(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")


def without_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "NoSuchModel"]
    (folder / "model_index.json").write_text(json.dumps(index))


def without_config(folder):
    (folder / "vae" / "config.json").unlink()


@pytest.mark.parametrize("damage", [broken, without_class, without_config])
def test_what_cannot_be_read_is_told(folder, damage):
    damage(folder)
    with pytest.raises(UserError, match=r"^pretrained_model_name_or_path: must name a Stable"):
        load_base(config(folder))


def test_pictures_at_a_time():
    assert [at_a_time(side**2) for side in (8, 16, 32, 64, 128)] == [16, 16, 4, 1, 1]


def test_pictures_do_not_depend_on_how_many_are_drawn_together(model_folder):
    family = load_base(config(model_folder))
    prompts = ["a toy", "a dog", "a lamp"]
    together, alone = (
        family.sample_latents(prompts, seed=0, steps=2, guidance=2.0, batch=batch)
        for batch in (3, 1)
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
