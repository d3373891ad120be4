# SPDX-License-Identifier: Apache-2.0
"""The two ridge maps, the scores' arithmetic, fitting, the benchmark's cases; stand-in encoders."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.base_model import seen_cases, unseen_cases
from persona.bridge import Bridge, Ridge, StyleClassifier, load_scorers, ranks, save_scorers
from persona.errors import UserError
from persona.evaluate import Scorer
from persona.fit_scorers import caption_key, choose, fit, split
from persona.prompts import STYLES


class Pixels:
    """An image encoder for tests: the picture's own mean colour, widened."""

    name = "pixels"

    def encode(self, images):
        colours = [np.asarray(image, dtype=np.float32).mean((0, 1)) for image in images]
        return torch.from_numpy(np.stack(colours)) / 255


class Words:
    """A text encoder for tests: one fixed random vector a text."""

    name = "words"

    def encode(self, texts):
        vectors = []
        for text in texts:
            generator = torch.Generator().manual_seed(int(caption_key(text)[:8], 16))
            vectors.append(torch.randn(16, generator=generator))
        return F.normalize(torch.stack(vectors), dim=-1)


# Ridge maps


def test_ridge_finds_a_known_linear_map():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) * torch.logspace(-2, 2, 12) + 3
    weight, bias = torch.randn(12, 5, generator=generator), torch.arange(5.0)
    loose, tight = Ridge.fit(x, x @ weight + bias, [1e-8, 1e6])
    torch.testing.assert_close(loose(x), x @ weight + bias, atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(tight(x), (x @ weight + bias).mean(0).expand(400, 5), atol=1, rtol=1)


def test_ridge_is_the_solution_of_its_normal_equations():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(50, 4, generator=generator), torch.randn(50, 3, generator=generator)
    (ridge,) = Ridge.fit(x, y, [0.7])
    z = (x - x.mean(0)) / x.std(0)
    expected = torch.linalg.solve(z.T @ z / 50 + 0.7 * torch.eye(4), z.T @ (y - y.mean(0)) / 50)
    torch.testing.assert_close(ridge.weight, expected, atol=1e-5, rtol=1e-4)


def test_a_feature_that_never_varies_does_no_harm():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(2))
    x[:, 1] = 0
    (ridge,) = Ridge.fit(x, x[:, :1], [1e-6])
    torch.testing.assert_close(ridge(x), x[:, :1], atol=1e-3, rtol=1e-3)


def test_style_classifier_tells_separable_styles_apart():
    labels = [STYLES[i % 5] for i in range(100)]
    x = StyleClassifier.targets(labels, STYLES)
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    (ridge,) = Ridge.fit(x, StyleClassifier.targets(labels, STYLES), [0.1])
    assert StyleClassifier(ridge, "pixels", STYLES)(x) == labels


def test_ranks_count_what_is_nearer_and_half_of_what_is_level():
    texts = torch.eye(3)
    images = torch.tensor([[0.9, 0.4, 0.1], [0.9, 0.4, 0.1], [0.5, 0.5, 0.5]])
    assert ranks(images, texts, torch.tensor([0, 2, 1])).tolist() == [0, 2, 1]


# Scores


@pytest.fixture
def scorer():
    """Picks the text vector of a colour from that colour's picture."""
    x = F.normalize(Pixels().encode(COLOURS.values()), dim=-1)
    (bridge,) = Ridge.fit(x, Words().encode(list(COLOURS)), [1e-6])
    labels = [STYLES[0], STYLES[1], STYLES[2]]
    (style,) = Ridge.fit(x, StyleClassifier.targets(labels, STYLES), [1e-6])
    return Scorer(
        Pixels(),
        Words(),
        Bridge(bridge, "pixels", "words"),
        StyleClassifier(style, "pixels", STYLES),
    )


COLOURS = {name: Image.new("RGB", (8, 8), name) for name in ("red", "lime", "blue")}


def test_subject_score_is_the_mean_cosine_of_all_pairs(scorer):
    red, lime, blue = COLOURS.values()
    assert scorer.subject([red], [red, red]) == pytest.approx(1)
    assert scorer.subject([red, lime], [red, blue]) == pytest.approx(0.25)
    assert scorer.similarity([red, lime], [red]).tolist() == [[1.0], [0.0]]


def test_text_retrieval_and_style_of_known_pictures(scorer):
    images, names = list(COLOURS.values()), list(COLOURS)
    assert scorer.text(images, names) == pytest.approx(1, abs=1e-3)
    assert scorer.text(images, names[1:] + names[:1]) < 0.1
    assert scorer.retrieval(images, names) == (1.0, 1.0)
    assert scorer.retrieval(images, names[1:] + names[:1]) == (0.0, 1.0)
    assert scorer.style_accuracy(images, [STYLES[0], STYLES[1], STYLES[0]]) == pytest.approx(2 / 3)


def test_features_stand_for_pictures(scorer):
    images, names = list(COLOURS.values()), list(COLOURS)
    features = scorer.features(images)
    assert scorer.retrieval(features, names) == scorer.retrieval(images, names)
    assert scorer.subject(features, images) == scorer.subject(images, images)


def test_scorer_refuses_what_it_cannot_score(scorer):
    images = list(COLOURS.values())
    with pytest.raises(UserError, match="one a picture, got 1 for 3 pictures"):
        scorer.text(images, ["red"])
    with pytest.raises(UserError, match=r"styles must be among .*, got oil painting"):
        scorer.style_accuracy(images, ["oil painting"] * 3)
    with pytest.raises(UserError, match="classifier must be given"):
        Scorer(Pixels()).style_accuracy(images, [STYLES[0]] * 3)
    with pytest.raises(UserError, match="text_encoder must be given"):
        Scorer(Pixels()).text(images, list(COLOURS))
    with pytest.raises(UserError, match=r"bridge must be given .* 3 picture and 16 text"):
        Scorer(Pixels(), Words()).text(images, list(COLOURS))


def test_maps_fitted_for_other_encoders_are_refused(scorer):
    other = Pixels()
    other.name = "other"
    with pytest.raises(UserError, match=r"image_encoder must be pixels.*got other"):
        Scorer(other, Words(), scorer.bridge)
    with pytest.raises(UserError, match=r"text_encoder must be words.*got other"):
        Scorer(Pixels(), other, scorer.bridge)


# Files and fitting


def test_scorers_survive_the_file(scorer, tmp_path):
    path = tmp_path / "scorers.safetensors"
    save_scorers(path, scorer.bridge, scorer.classifier, {"heldout_top1": 0.25})
    bridge, classifier, facts = load_scorers(path)
    assert facts["heldout_top1"] == 0.25
    assert (bridge.text_encoder, classifier.styles) == ("words", STYLES)
    x = scorer.features(list(COLOURS.values()))
    torch.testing.assert_close(bridge.pictures(x), scorer.bridge.pictures(x), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("content", [None, b"not tensors"])
def test_a_missing_or_damaged_scorer_file_is_named(tmp_path, content):
    path = tmp_path / "scorers.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"scorers\.safetensors .*; make one with"):
        load_scorers(path)


@pytest.fixture
def data(tmp_path):
    """120 pictures of one colour each, 40 captions in three styles."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (40, 3), dtype=np.uint8).repeat(3, 0)
    images = np.broadcast_to(colours[:, None, None], (120, 8, 8, 3))
    names = [f"colour {'abcdefghij'[i // 10]}{'abcdefghij'[i % 10]}" for i in range(40)]
    records = [
        {
            "caption": names[i // 3],
            "style": STYLES[i % 3],
            "variant": i == 0,
            "file": f"{i}.png",
            "keywords": ["paint"],
        }
        for i in range(120)
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "train.npz", images=images)
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder, images, records


def test_held_out_captions_are_never_fitted(data):
    _, _, records = data
    chosen = choose(records, 100)
    cut = split(records, chosen)
    fitted = {records[i]["caption"] for i in chosen[:cut]}
    held_out = {records[i]["caption"] for i in chosen[cut:]}
    assert len(chosen) == 100 and 80 <= cut <= 92
    assert fitted.isdisjoint(held_out)
    assert 0 not in choose(records, 7000)  # a variant


def test_fit_writes_scorers_and_continues_from_its_cache(data, tmp_path):
    folder, _, _ = data
    out, cache = tmp_path / "new" / "scorers.safetensors", tmp_path / "features.safetensors"
    first = fit(folder, out, Pixels(), Words(), pictures=60, cache=cache)
    assert first["fitted_pictures"] + first["heldout_pictures"] == 60
    fit(folder, out, Pixels(), Words(), pictures=119, cache=cache)
    assert fit(folder, out, NeverCalled(), Words(), pictures=60, cache=cache) == first
    assert load_scorers(out)[2]["last_caption_key"] == first["last_caption_key"]


class NeverCalled(Pixels):
    def encode(self, images):
        raise AssertionError("the cache holds these")


def test_fit_refuses_a_cache_of_another_encoder(data, tmp_path):
    folder, _, _ = data
    cache = tmp_path / "features.safetensors"
    fit(folder, tmp_path / "a.safetensors", Pixels(), Words(), pictures=60, cache=cache)
    other = Pixels()
    other.name = "other"
    with pytest.raises(UserError, match="cache must hold features of other"):
        fit(folder, tmp_path / "b.safetensors", other, Words(), pictures=60, cache=cache)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("option", ["out", "cache"])
def test_fit_names_the_option_whose_place_takes_no_files(data, tmp_path, option):
    folder, _, _ = data
    (tmp_path / "file").touch()
    places = {name: tmp_path / name / "x.safetensors" for name in ("out", "cache")}
    places[option] = tmp_path / "file" / "x.safetensors"
    with pytest.raises(UserError, match=f"^{option}: must be a folder that can be written"):
        fit(folder, places["out"], Pixels(), Words(), pictures=60, cache=places["cache"])


# Cases of the benchmark


def test_benchmark_cases_are_distinct_and_seen_or_unseen(data):
    _, images, records = data
    taught_as_tiles = sorted({r["caption"] for r in records} - {"colour ac"})
    tile = {"style": "pixel tile", "variant": False, "file": "t", "keywords": taught_as_tiles}
    records = [*records, *({**tile, "caption": f"tile {c}"} for c in "abcdefgh")]
    images = np.concatenate([images, images[:8]])
    pairs_in_order = [(r["caption"], r["style"]) for r in records]
    pairs = set(pairs_in_order)

    seen = seen_cases(images[:120], records[:120], "", 3, seed=0)
    assert len({case.caption for case in seen}) == 3
    assert {(case.caption, case.style) for case in seen} <= pairs
    for case in seen:
        index = pairs_in_order.index((case.caption, case.style))
        assert np.array_equal(np.asarray(case.picture), images[index])

    unseen = unseen_cases(records, "", 5, seed=0)
    assert len({case.caption for case in unseen}) == 5
    assert not pairs & {(case.caption, case.style) for case in unseen}
    # A keyword is taught as well: one colour is left that no tile was ever called.
    assert [case.caption for case in unseen if case.style == "pixel tile"] == ["colour ac"]
    for case in unseen:
        assert case.picture is None
        assert case.caption.startswith("tile") == case.style.endswith("emoji")


def test_benchmark_asks_for_fewer_pictures_than_there_are_captions(data):
    _, images, records = data
    with pytest.raises(UserError, match="got 500; ask for fewer"):
        seen_cases(images, records, "", 500, seed=0)
