# SPDX-License-Identifier: Apache-2.0
"""Pictures, captions and timesteps: what the training sees."""

import numpy as np
import pytest
import torch
from PIL import Image

from persona.data import load_folder, to_pixels
from persona.errors import UserError
from persona.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES
from persona.timesteps import Window


def only(folder, **options):
    (example,) = load_folder(folder, **({"resolution": 8} | options))
    return example


def test_transparent_pictures_are_laid_on_white(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = np.asarray(only(tmp_path).image)
    assert image.shape == (8, 8, 3)
    assert (image[:4] == (255, 0, 0)).all() and (image[4:] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "I;16"])
def test_other_colour_modes_are_read(tmp_path, mode, picture):
    kind = "tiff" if mode == "CMYK" else "png"
    picture(size=8).convert("L" if mode in ("I;16", "LA") else mode).convert(mode).save(
        tmp_path / "a.png", format=kind
    )
    assert only(tmp_path).image.mode == "RGB"


def test_cropping_keeps_the_middle_square(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (np.asarray(only(tmp_path, center_crop=True).image) == 200).all()
    squeezed = np.asarray(only(tmp_path).image)
    assert squeezed.shape == (8, 8, 3) and squeezed.min() == 0


def test_a_photo_is_turned_as_the_camera_says(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turn by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    image = np.asarray(only(tmp_path).image)
    assert (image[:4] == 255).all() and (image[4:] == 0).all()


def test_pixels_are_from_minus_one_to_one():
    black, white = Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2), "white")
    pixels = to_pixels([black, white])
    assert pixels.shape == (2, 3, 2, 4) and pixels.dtype == torch.float32
    assert (pixels[0] == -1).all() and (pixels[1] == 1).all()


def test_captions_come_from_sidecars_or_templates(pictures_folder):
    first, second, _ = load_folder(pictures_folder, resolution=64)
    assert [first.path.name, second.path.name] == ["0.png", "1.png"]
    assert first.prompts == OBJECT_TEMPLATES
    assert second.prompts == ("a photo of {} on a sofa",)
    style = load_folder(pictures_folder, resolution=64, learnable_property="style")
    assert style[0].prompts == STYLE_TEMPLATES
    assert all("{}" in prompt for prompt in (*OBJECT_TEMPLATES, *STYLE_TEMPLATES))


def test_other_files_are_not_pictures(tmp_path, picture):
    picture().save(tmp_path / "A.JPEG")
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "folder").mkdir()
    assert only(tmp_path, resolution=64).path.name == "A.JPEG"


def test_half_the_resolution_is_enough(tmp_path, picture):
    picture(size=32).save(tmp_path / "a.png")
    assert only(tmp_path, resolution=64).image.size == (64, 64)
    with pytest.raises(UserError, match="at least 33 pixels a side for resolution 66"):
        only(tmp_path, resolution=66)


def test_the_window_holds_its_lower_bound_and_not_its_upper():
    generator = torch.Generator().manual_seed(0)
    t = Window(3, 7).sample(1000, generator)
    assert t.dtype == torch.int64 and set(t.tolist()) == {3, 4, 5, 6}
    assert Window(5, 6).sample(3, generator).tolist() == [5, 5, 5]
    assert (Window().low, Window().high) == (500, 900)


@pytest.mark.parametrize("bounds", [(7, 7), (8, 7), (-1, 7)])
def test_an_empty_window_is_refused(bounds):
    with pytest.raises(ValueError, match="0 <= low < high"):
        Window(*bounds)
