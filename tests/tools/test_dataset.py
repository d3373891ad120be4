# SPDX-License-Identifier: Apache-2.0
"""Training data from unpacked packages: what is kept, what is held out, how they are fetched."""

import json

import numpy as np
import pytest
from PIL import Image

from tools.tiny_sd import data, dataset

NEAREST = Image.Resampling.NEAREST
SVG = """<svg xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:cc="http://web.resource.org/cc/"><rdf:RDF>
<cc:Work><dc:title>{}</dc:title><dc:subject><rdf:Bag><rdf:li>hash</rdf:li><rdf:li>Old_Food</rdf:li>
</rdf:Bag></dc:subject><dc:creator><cc:Agent><dc:title>someone</dc:title></cc:Agent></dc:creator>
</cc:Work></rdf:RDF></svg>"""


def paint(path, *color, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", size, color).save(path, lossless=True)


def emoji_entry(name, code, tones=()):
    return {
        "name": name,
        "unified": code.upper(),
        "image": f"{code}.png",
        "category": "Things",
        "subcategory": "thing",
        "skin_variations": {tone: {"image": f"{code}-{tone.lower()}.png"} for tone in tones},
    }


@pytest.fixture
def packages(tmp_path):
    """Five emoji, one of them with skin tones, three tiles and two drawings."""
    root = tmp_path / "packages"
    entries = [
        emoji_entry("KEYCAP 1", "31-20e3"),
        emoji_entry("SNOW-CAPPED MOUNTAIN", "1f3d4", ["1F3FB", "1F3FB-1F3FC"]),
        emoji_entry("CAMERA", "1f4f7"),
        emoji_entry("VIDEO CAMERA", "1f4f9"),
        emoji_entry("SECRET", "1f92b"),
    ]
    codes = [entry["unified"].lower() for entry in entries]
    codes += ["1f3d4-1f3fb", "1f3d4-1f3fb-1f3fc"]
    for depth, (package, folder, extension) in enumerate(dataset.EMOJI.values()):
        for number, code in enumerate(codes):
            same = 0 if code == "1f3d4-1f3fb" else 50 * depth
            paint(root / package / folder / f"{code}{extension}", 20 * number, same, 9, 255)
    (root / "google/package/emoji.json").write_text(json.dumps(entries))
    words = root / "emojilib/package/dist/emoji-en-US.json"
    words.parent.mkdir(parents=True)
    words.write_text(json.dumps({"\U0001f3d4": ["snow_mountain", *map(str, range(20))]}))
    for number, file in enumerate(("item/key2.png", "item/a1.png", "mon/sea/camera_n.png")):
        paint(root / "tiles/releases/Nov-2015" / file, 0, number, 99, 255, size=(4, 6))
    for stem, title in ("pie_jo_bo_01", "Apple & Pie!"), ("gear_jo_bo_01", "Lemon theme"):
        svg = root / f"clipart-svg/usr/share/openclipart/svg/food/{stem}.svg"
        svg.parent.mkdir(parents=True, exist_ok=True)
        svg.write_text(SVG.format(title.replace("&", "&amp;")))
        paint(
            root / f"clipart-png/usr/share/openclipart/png/food/{stem}.png", len(title), 0, 0, 255
        )
    return root


@pytest.fixture
def built(packages, tmp_path):
    (tmp_path / "exclude").write_text("secret\n\n")
    out = tmp_path / "out"
    dataset.main([f"--packages={packages}", f"--out={out}", f"--exclude={tmp_path / 'exclude'}"])
    return tmp_path / "out"


def test_train_holds_what_is_new_and_names_no_subject(built):
    pictures = data.load(built)
    mountain, tone = "snow capped mountain", "snow capped mountain light skin"
    assert [(r["caption"], r["style"]) for r in pictures.records] == [
        *((mountain, style) for style in dataset.EMOJI),
        (tone, "google emoji"),  # the other two styles have the same pixels
        ("key", "pixel tile"),
        ("gear", "clip art"),
        ("apple  pie", "clip art"),
    ]
    assert pictures.images.shape == (7, 64, 64, 3)
    first, tile, drawing = (pictures.records[n] for n in (0, 4, 6))
    assert first["keywords"] == ["snow mountain", *map(str, range(11))]
    assert [r["variant"] for r in pictures.records] == [False, False, False, True] + [False] * 3
    assert (tile["category"], tile["sub"], tile["keywords"]) == ("item", "", ["item"])
    assert (drawing["file"], drawing["keywords"]) == ("food/pie_jo_bo_01.svg", ["old food"])


def test_dev_subjects_are_apart_in_every_style(built):
    lines = (built / "dev_subjects.jsonl").read_text().splitlines()
    assert [json.loads(line)["style"] for line in lines] == list(dataset.EMOJI)
    assert {json.loads(line)["caption"] for line in lines} == {"camera"}
    assert np.load(built / "dev_subjects.npz")["images"].shape == (3, 64, 64, 3)
    assert sorted(p.suffix for p in built.iterdir()) == [".jsonl", ".jsonl", ".npz", ".npz"]


def test_a_picture_is_centred_on_white(tmp_path):
    paint(tmp_path / "wide.png", 255, 0, 0, 255, size=(4, 2))
    image = dataset.picture(tmp_path / "wide.png", NEAREST)
    assert image.dtype == np.uint8 and (image[16:48] == (255, 0, 0)).all()
    assert (image[:16] == 255).all() and (image[48:] == 255).all()
    paint(tmp_path / "clear.png", 0, 0, 0, 0)
    assert (dataset.picture(tmp_path / "clear.png", NEAREST) == 255).all()


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("i-gain_dexterity", "gain dexterity"),
        ("crypt_domino_1a", "crypt domino"),
        ("stone2_brown3", "stone2 brown"),
        ("vine_E", "vine E"),
        ("07", ""),
    ],
)
def test_tile_caption(stem, caption):
    assert dataset.tile_caption(stem) == caption


@pytest.mark.parametrize(
    ("title", "stem", "caption"),
    [
        ("Red_Apple", "x", "red apple"),
        ("Lemon SVG theme", "view_mag+", "view mag"),
        ("Hotel Icon Collection", "hotel_icon_collection_b_01", "hotel icon"),
    ],
)
def test_clip_art_caption(title, stem, caption):
    assert dataset.clip_art_caption(title, stem) == caption


def sources(commands):
    return {"thing": (commands, "thing@1", "release")}


def test_a_source_that_cannot_be_had_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SOURCES", sources("no-npm {0}; touch {1}"))
    message = r"fetch: thing@1 must be fetchable with no-npm, got exit code 127 \(.*unpack.*/thing"
    with pytest.raises(RuntimeError, match=message):
        dataset.fetch(tmp_path)
    assert not (tmp_path / "thing").exists()


def test_a_source_is_fetched_once_and_whole(tmp_path, monkeypatch):
    (tmp_path / "thing.tmp").mkdir()
    (tmp_path / "thing.tmp/rest_of_an_earlier_try").touch()
    monkeypatch.setattr(dataset, "SOURCES", sources("touch {0}; touch {1}"))
    dataset.fetch(tmp_path)
    monkeypatch.setattr(dataset, "SOURCES", sources("false"))
    dataset.fetch(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["release", "thing", "thing@1"]
