# SPDX-License-Identifier: Apache-2.0
"""Rebuild the training data of tiny-sd: ``python -m tools.tiny_sd.dataset --out FOLDER``.

| pictures | from | licence |
|---|---|---|
| google emoji | npm ``emoji-datasource-google`` (Noto Emoji) | Apache-2.0 |
| twitter emoji | npm ``emoji-datasource-twitter`` (Twemoji) | CC-BY-4.0 |
| 3d emoji | npm ``@lobehub/fluent-emoji-3d`` (Fluent Emoji) | MIT |
| keywords of all three | npm ``emojilib`` | MIT |
| pixel tile | github ``crawl/tiles``, release Nov-2015 (Dungeon Crawl Stone Soup) | CC0 |
| clip art | Debian ``openclipart-png``; captions from ``openclipart-svg`` | public domain |

Needs Pillow (``pip install zo-kernels[data]``), npm, git, and Debian's apt-get and dpkg-deb; each
fetches from where it is configured to. A package that is already unpacked in ``--packages`` is not
fetched again, which is the way in for one that was fetched elsewhere.

A picture is padded to a square on white and scaled to 64x64; one that was seen before is left out.
``--exclude FILE`` holds out further subjects, a caption a line: neither they nor a picture that
names one in its caption are written.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from persona.prompts import STYLES

SIZE = 64
LANCZOS, NEAREST = Image.Resampling.LANCZOS, Image.Resampling.NEAREST
NPM = "npm pack --silent --ignore-scripts {0}; tar --extract --file *.tgz; rm *.tgz"
DEBIAN = "apt-get --quiet download {0}; dpkg-deb --extract *.deb .; rm *.deb"
GIT = """git init --quiet; git fetch --quiet --depth 1 {0} {1}
git checkout --quiet FETCH_HEAD -- {2}; rm -r .git"""
TILES, TILES_COMMIT = "releases/Nov-2015", "a6ea1655db5c044829d9eea19a232fa6fcac87b0"
# folder in --packages: the shell commands that fill it, and what they fetch
SOURCES = {
    "google": (NPM, "emoji-datasource-google@16.0.0"),
    "twitter": (NPM, "emoji-datasource-twitter@16.0.0"),
    "fluent": (NPM, "@lobehub/fluent-emoji-3d@1.1.0"),
    "emojilib": (NPM, "emojilib@4.0.3"),
    "clipart-png": (DEBIAN, "openclipart-png"),
    "clipart-svg": (DEBIAN, "openclipart-svg"),
    "tiles": (GIT, "https://github.com/crawl/tiles", TILES_COMMIT, TILES),
}
# style: package, folder in it, extension
EMOJI = {
    "google emoji": ("google", "package/img/google/64", ".png"),
    "twitter emoji": ("twitter", "package/img/twitter/64", ".png"),
    "3d emoji": ("fluent", "package/assets", ".webp"),
}
ENTRIES = "google/package/emoji.json"
KEYWORDS = "emojilib/package/dist/emoji-en-US.json"
MAX_KEYWORDS = 12

# The subjects that personalization is developed on, by code point: dev_subjects.*, never train.*.
DEV_SUBJECTS = """
    1f30a 1f31e 1f339 1f39b-fe0f 1f3a4 1f3b0 1f3b5 1f3d2 1f3de-fe0f 1f3ee 1f427 1f458 1f484 1f4e2
    1f4f7 1f50f 1f68d 1f6bd 1f6cd-fe0f 1f6cf-fe0f 1f6f3-fe0f 1f6f9 1f966 1f990 1f99b 1f9ec 1fa84
    1fab7 2600-fe0f 2692-fe0f 26be 26ea
""".split()  # noqa: SIM905  a list of quoted words reads worse
SKINS = ("light", "medium light", "medium", "medium dark", "dark")
TONES = {f"1F3F{digit}": f"{skin} skin" for digit, skin in zip("BCDEF", SKINS, strict=True)}

Record = dict[str, Any]
# A record, its picture's file, and the filter that scales it.
Item = tuple[Record, Path, Image.Resampling]


def fetch(packages: Path) -> None:
    """Fill ``packages`` with one folder a source; those that are there stay as they are.

    Raises:
        RuntimeError: a source cannot be fetched.
    """
    for name, (commands, *source) in SOURCES.items():
        if (packages / name).exists():
            continue
        print(f"fetching {source[0]}", flush=True)
        temporary = packages / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        script = ["/bin/sh", "-ec", commands.format(*source)]
        done = subprocess.run(script, cwd=temporary, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"fetch: {source[0]} must be fetchable with {commands.split()[0]}, got exit code "
                f"{done.returncode} ({done.stderr.strip()[-500:]}); or unpack it into "
                f"{packages / name} yourself"
            )
        os.replace(temporary, packages / name)


def picture(path: Path, resample: Image.Resampling) -> np.ndarray:
    """The picture at ``path``, centred on a white square, as uint8 [64, 64, 3]."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.convert("RGB").resize((SIZE, SIZE), resample))


def emoji(packages: Path) -> Iterator[Item]:
    """Every emoji and its single skin tones, style by style within each; no keycaps.

    Pairs of skin tones are left out: seven in eight do not exist in 3d.
    """
    entries = json.loads((packages / ENTRIES).read_text("utf-8"))
    keywords = json.loads((packages / KEYWORDS).read_text("utf-8"))
    for entry in entries:
        caption = entry["name"].lower().replace("-", " ")
        if caption.startswith("keycap"):
            continue
        text = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
        for tone, look in {"": entry, **entry.get("skin_variations", {})}.items():
            if tone and tone not in TONES:
                continue
            record = {
                "caption": f"{caption} {TONES[tone]}" if tone else caption,
                "keywords": [k.replace("_", " ") for k in keywords.get(text, [])][:MAX_KEYWORDS],
                "category": entry["category"],
                "sub": entry["subcategory"],
                "variant": bool(tone),
            }
            for style, (package, folder, extension) in EMOJI.items():
                file = Path(look["image"]).stem + extension
                path = packages / package / folder / file
                if path.exists():
                    yield record | {"file": file, "style": style}, path, LANCZOS


def _placed(file: Path, caption: str, keywords: list[str], style: str) -> Record:
    """A record whose category and sub-category are the first folders of its ``file``."""
    folders = file.parent.parts
    return {
        "caption": caption,
        "keywords": keywords[:MAX_KEYWORDS],
        "category": folders[0],
        "sub": folders[1] if len(folders) > 1 else "",
        "variant": False,
        "file": file.as_posix(),
        "style": style,
    }


def _files(root: Path, extension: str) -> list[Path]:
    """Files below ``root`` with ``extension``, relative to it, in the order of their paths."""
    return sorted((p.relative_to(root) for p in root.rglob(f"*{extension}")), key=Path.as_posix)


def tile_caption(stem: str) -> str:
    """``"i-gain_dexterity"`` -> ``"gain dexterity"``: no numbering, side or single letter."""
    words = [w for w in re.split("[_ -]", stem) if not re.fullmatch(r"\d*[a-z]?|new|old", w)]
    return re.sub(r"\d+$", "", " ".join(words)).strip()


def tiles(packages: Path) -> Iterator[Item]:
    """The dungeon tiles that show something: no blood stains, no parts of the interface."""
    root = packages / "tiles" / TILES
    for file in _files(root, ".png"):
        caption = tile_caption(file.stem)
        skipped = file.parts[0] in {"UNUSED", "gui"} or file.parts[:2] == ("misc", "blood")
        if len(caption) >= 3 and not skipped:
            keywords = [folder.replace("_", " ") for folder in file.parent.parts]
            yield _placed(file, caption, keywords, "pixel tile"), root / file, NEAREST


def clip_art_caption(title: str, stem: str) -> str:
    """The title; the file's name, less its author, where a whole collection shares one title."""
    if re.search("theme|collection", title, re.IGNORECASE):
        stem = re.sub(r"_[a-z.]+_[a-z.]+_\d+$|_+\d+$", "", stem)
        title = re.sub("[_-]", " ", stem)
    text = title.lower().replace("&", "").replace("_", " ")
    return re.sub(r"[^a-z0-9 ,'()-]", " ", text).strip()[:120]


def clip_art_text(svg: Path) -> tuple[str, list[str]]:
    """Title and keywords that the RDF of ``svg`` states of the drawing."""
    work = next((x for x in ET.parse(svg).iter() if x.tag.endswith("}Work")), None)
    if work is None:
        return "", []
    words = [(x.text or "").lower().replace("_", " ") for x in work.iterfind("{*}subject//{*}li")]
    return work.findtext("{*}title") or "", [w for w in words if w != "hash"]


def clip_art(packages: Path) -> Iterator[Item]:
    """The titled drawings of Open Clip Art, as Debian rendered them; no plain shapes or lamps."""
    root = packages / "clipart-svg/usr/share/openclipart/svg"
    rendered = packages / "clipart-png/usr/share/openclipart/png"
    for file in _files(root, ".svg"):
        path = rendered / file.with_suffix(".png")
        plain = file.parts[0] == "shapes" or file.parts[:2] == ("signs_and_symbols", "led")
        if plain or not path.exists():
            continue
        title, keywords = clip_art_text(root / file)
        caption = clip_art_caption(title, file.stem)
        if len(caption) >= 3:
            yield _placed(file, caption, keywords, "clip art"), path, LANCZOS


def split(items: Iterable[Item], excluded: Iterable[str] = ()) -> tuple[list[Item], list[Item]]:
    """Items for training and items of the dev subjects.

    No subject's name stands in a caption for training: the camera takes the video camera and every
    drawing of a camera with it. The captions in ``excluded`` are held out in the same way, and
    written nowhere.
    """
    train, dev, names = list[Item](), list[Item](), set(excluded)
    for item in items:
        if Path(item[0]["file"]).stem in DEV_SUBJECTS:
            names.add(item[0]["caption"])
            dev.append(item)
        else:
            train.append(item)
    named = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    return [item for item in train if not named.search(item[0]["caption"])], dev


def render(items: list[Item], seen: set[bytes]) -> tuple[np.ndarray, list[Record]]:
    """Pictures uint8 [N, 64, 64, 3] and records of the items whose pixels ``seen`` has not seen."""
    images, records = [], []
    for record, path, resample in items:
        try:
            image = picture(path, resample)
        except Image.DecompressionBombError:
            continue  # a few drawings were rendered at hundreds of megapixels
        digest = hashlib.sha256(image.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            images.append(image)
            records.append(record)
    return np.stack(images), records


def write(out: Path, name: str, images: np.ndarray, records: list[Record]) -> None:
    """Write ``name.npz`` and ``name.jsonl`` into ``out``, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    pixels, lines = out / f"{name}.npz.tmp", out / f"{name}.jsonl.tmp"
    with open(pixels, "wb") as file:
        np.savez_compressed(file, images=images)
    lines.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(pixels, out / f"{name}.npz")
    os.replace(lines, out / f"{name}.jsonl")


def build(packages: Path, out: Path, excluded: Iterable[str] = ()) -> None:
    """Make ``train`` and ``dev_subjects`` in ``out`` from the packages in ``packages``.

    excluded: captions of further subjects to hold out.

    Raises:
        ValueError: a style has no picture, so a package was unpacked elsewhere or in part.
    """
    train, dev = split(chain(emoji(packages), tiles(packages), clip_art(packages)), excluded)
    if missing := set(STYLES) - {record["style"] for record, *_ in train}:
        raise ValueError(
            f"build: packages must hold pictures of every style, got no {sorted(missing)} in "
            f"{packages}; delete the folder of that source there, to fetch it again"
        )
    seen: set[bytes] = set()
    for name, items in ("dev_subjects", dev), ("train", train):
        images, records = render(items, seen)
        write(out, name, images, records)
        print(f"{name}: {len(records)}", dict(Counter(r["style"] for r in records)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for train.* and dev_*")
    parser.add_argument(
        "--packages", type=Path, default="build/tiny-sd-packages", help="unpacked sources; 0.5 GB"
    )
    parser.add_argument("--exclude", type=Path, help="captions to hold out as well, one a line")
    args = parser.parse_args(argv)
    excluded = args.exclude.read_text(encoding="utf-8").splitlines() if args.exclude else []
    fetch(args.packages)
    build(args.packages, args.out, [line.strip() for line in excluded if line.strip()])


if __name__ == "__main__":
    main()
