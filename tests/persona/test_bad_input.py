# SPDX-License-Identifier: Apache-2.0
"""What the command answers to bad input: one line with argument, requirement, value, way out."""

import errno
import os
import re
import shutil

import pytest

from persona.cli import main
from persona.config import TextualInversionConfig
from persona.errors import UserError

GRAMMAR = re.compile(r"persona: (?P<what>\w+): .*must .+, got .+; .+\n")


@pytest.fixture
def refused(command, capsys):
    """A function: what is wrong, changed options -> the line; the run must leave no result."""

    def run(what, **changes):
        arguments = command(**changes)
        assert main(arguments) == 2
        printed = capsys.readouterr()
        match = GRAMMAR.fullmatch(printed.err)
        assert match and match["what"] == what, printed.err
        assert printed.out == ""
        out = arguments[arguments.index("--output_dir") + 1]
        assert not os.path.isdir(out) or os.listdir(out) == []
        return printed.err

    return run


@pytest.fixture
def folder(tmp_path, picture):
    """A folder with one good picture."""
    path = tmp_path / "pictures"
    path.mkdir()
    picture().save(path / "good.png")
    return path


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_picture_is_named(refused, folder, picture, kind, damage):
    bad = folder / f"bad.{kind}"
    picture().save(bad)
    if damage == "truncated":
        truncated(bad)
    else:
        bad.write_text("" if damage == "empty" else "no picture")
    assert f"got {bad} (" in refused("train_data_dir", train_data_dir=str(folder))


def test_a_picture_that_claims_billions_of_pixels(refused, folder, picture):
    bad = folder / "bomb.bmp"
    picture().save(bad)
    content = bytearray(bad.read_bytes())
    content[18:26] = (100_000).to_bytes(4, "little") * 2  # width and height
    bad.write_bytes(content)
    assert "bomb.bmp" in refused("train_data_dir", train_data_dir=str(folder))


def test_a_picture_that_is_too_small(refused, folder, picture):
    picture(size=31).save(folder / "small.png")
    line = refused("train_data_dir", train_data_dir=str(folder))
    assert "at least 32 pixels a side for resolution 64" in line
    assert "small.png with 31x31; use a larger picture or a smaller --resolution" in line


def test_no_picture_no_folder(refused, folder):
    shutil.move(folder / "good.png", folder / "good.xyz")
    assert "got none in" in refused("train_data_dir", train_data_dir=str(folder))
    missing = str(folder / "missing")
    assert f"got {missing}; check" in refused("train_data_dir", train_data_dir=missing)


@pytest.mark.parametrize("caption", ["a photo of my dog", "", "a {dog}"])
def test_a_caption_without_a_place_for_the_token(refused, folder, caption):
    (folder / "good.txt").write_text(caption)
    line = refused("train_data_dir", train_data_dir=str(folder))
    assert f"must hold {{}} where the token goes, got {caption!r} in {folder}/good.txt" in line


def test_a_caption_in_another_encoding(refused, folder):
    (folder / "good.txt").write_bytes("ein Photo von {} auf Möbeln".encode("latin-1"))
    assert "UTF-8" in refused("train_data_dir", train_data_dir=str(folder))


def test_other_braces_of_a_caption_are_text(command, folder):
    (folder / "good.txt").write_text("a {} on {0} { and {sofa}")
    assert main(command(train_data_dir=str(folder), max_train_steps=1)) == 0


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--zo_taau", "3"], "--zo_taau: must be an option of .* did you mean --zo_tau"),
        (["--resolutio=3"], "--resolutio=3: must be an option of .* did you mean --resolution"),
        (["--zo_n", "two"], "argument --zo_n/--n: invalid int value: 'two'"),
        (["--zo_estimator", "both"], "--zo_estimator: invalid choice: 'both' .*'two_sided'"),
    ],
)
def test_an_unknown_option_or_value(capsys, arguments, answer):
    with pytest.raises(SystemExit) as stop:
        main(["ti", *arguments])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert re.fullmatch(f"persona: .*{answer}.*; see persona ti --help\n", line)


@pytest.mark.parametrize(
    "bad",
    [
        {"zo_n": 0},
        {"zo_nu": 1.0},
        {"zo_nu": float("nan")},
        {"zo_eps": 0.0},
        {"learning_rate": float("inf")},
        {"adam_beta2": 1.0},
        {"max_timestep": 500},
        {"seed": 2**63},
        {"zo_subspace": "some"},
        {"num_vectors": 0},
        {"validation_prompt": "a photo of my dog"},
    ],
    ids=str,
)
def test_a_value_out_of_range(bad):
    name = next(iter(bad))
    with pytest.raises(UserError) as error:
        TextualInversionConfig(**bad)
    match = GRAMMAR.fullmatch(f"persona: {error.value}\n")
    assert match and match["what"] == name


@pytest.mark.parametrize(
    "bad",
    [
        {"resolution": 60},
        {"max_timestep": 1001},
        {"num_vectors": 19},
        {"initializer_token": "zebra"},
        {"initializer_token": ""},
        {"placeholder_token": "dog"},
    ],
    ids=str,
)
def test_a_value_that_the_model_does_not_allow(refused, bad):
    name, value = next(iter(bad.items()))
    assert str(value) in refused(name, **bad)


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: shutil.rmtree(model / "unet"),
        lambda model: truncated(model / "unet" / "diffusion_pytorch_model.safetensors"),
        lambda model: truncated(model / "text_encoder" / "model.safetensors"),
        lambda model: truncated(model / "vae" / "config.json"),
        lambda model: truncated(model / "tokenizer" / "tokenizer.json"),
    ],
    ids=["part missing", "unet", "text encoder", "config", "tokenizer"],
)
def test_a_damaged_model(refused, model_folder, tmp_path, damage):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    damage(model)
    name = "pretrained_model_name_or_path"
    assert str(model) in refused(name, **{name: str(model)})


def test_an_output_folder_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").touch()
    line = refused("output_dir", output_dir=str(tmp_path / "file"))
    assert "file (File exists); choose another" in line


def test_an_output_folder_without_the_right_to_write(refused, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write anywhere
    assert "(Permission denied); choose another or change its rights" in refused("output_dir")
