# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest
import torch
from colored_subjects import COLORS, picture
from PIL import Image

from benchmarks import personal_tables, personalization
from benchmarks.personal_methods import (
    BUDGET,
    METHODS,
    Job,
    Learned,
    Method,
    by_backpropagation,
    learn,
    make_config,
    pictures_a_step,
)
from benchmarks.personal_scores import COMPOSITIONS, Drawing, Judge, draw
from benchmarks.personal_subjects import class_word, read_subjects
from benchmarks.report import section
from persona.data import load_folder
from persona.errors import UserError


class ColorScorer:
    """Scores pictures by their mean colour."""

    names = {"image": "mean colour", "text": "none"}  # noqa: RUF012  never changed

    def features(self, images):
        if isinstance(images, torch.Tensor):
            return images
        return torch.tensor(np.stack([np.asarray(i).mean((0, 1)) for i in images])).float()

    def similarity(self, images, references):
        unit = (
            torch.nn.functional.normalize(self.features(x), dim=-1) for x in (images, references)
        )
        left, right = unit
        return left @ right.T

    def style_accuracy(self, features, styles):
        assert len(features) == len(styles)
        return 0.5

    def text(self, features, captions):
        assert len(features) == len(captions)
        return 0.25


class ColorFamily:
    """Draws the colour that the word of the prompt names."""

    def sample(self, prompts, *, seed, steps, guidance, batch):
        return [picture(next(c for n, c in COLORS.items() if n in p)) for p in prompts]


def test_subjects_hold_out_their_last_style(subjects_file, tmp_path):
    rose, *others = read_subjects(subjects_file, lambda word: True)
    assert (rose.name, rose.word, rose.held_out) == ("rose", "plant", "3d emoji")
    assert rose.trained == ["google emoji", "twitter emoji"] and len(others) == 2
    assert len({s.digest for s in (rose, *others)}) == 3
    examples = load_folder(rose.write(tmp_path / "rose"), resolution=64)
    assert [e.prompts for e in examples] == [
        ("a google emoji of a {}",),
        ("a twitter emoji of a {}",),
    ]


def test_class_word():
    record = {"caption": "water wave", "keywords": ["Water", "tsunami", "sea"], "sub": "sky & rain"}
    assert class_word(record, lambda w: w in ("water", "sea", "rain")) == "sea"
    assert class_word(record, lambda w: w == "rain") == "rain"
    assert class_word(record, lambda w: False) == "object"
    assert class_word(record | {"word": "lake"}, lambda w: True) == "lake"


def test_subjects_that_are_not_of_the_form(subjects_file, tmp_path):
    with pytest.raises(UserError, match=r"subjects: must be an .npz"):
        read_subjects(tmp_path / "none.npz", lambda w: True)
    notes = subjects_file.with_suffix(".jsonl")
    lines = notes.read_text().splitlines()
    notes.write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match="got 8 for 9 pictures"):
        read_subjects(subjects_file, lambda w: True)
    notes.write_text("\n".join(lines).replace("3d emoji", "oil"))
    with pytest.raises(UserError, match="got oil"):
        read_subjects(subjects_file, lambda w: True)


def test_pictures_of_the_subject_win(subjects_file):
    subjects = read_subjects(subjects_file, lambda word: True)
    judge = Judge(ColorScorer(), subjects)
    sheet = draw(ColorFamily(), subjects[0], "rose", 0, Drawing())
    good = judge.scores(sheet, subjects[0])
    assert good["retrieval"] == good["trained_retrieval"] == 1
    assert good["fidelity"] > 0.99 and good["alike"] == pytest.approx(1)
    bad = judge.scores(draw(ColorFamily(), subjects[0], "sea", 0, Drawing()), subjects[0])
    assert bad["retrieval"] == 0 and bad["fidelity"] < 0.1
    assert len(sheet.composed) == len(COMPOSITIONS)


def test_drift(subjects_file):
    judge = Judge(ColorScorer(), read_subjects(subjects_file, lambda word: True))
    black, red = [picture((0, 0, 0))], [picture((255, 0, 0))]
    assert judge.drift(red, red) == {"drift": pytest.approx(0), "drift_pixels": 0}
    assert judge.drift(black, red)["drift_pixels"] == pytest.approx(3**-0.5)


@pytest.fixture
def command(subjects_file, tmp_path, monkeypatch):
    """A function: more arguments -> exit code; `command.trained` lists what was trained."""
    trained = []

    def train(options, job):
        trained.append((job.subject.name, job.seed, options))
        return Learned(ColorFamily(), job.subject.name, 12, 0, 7, base=ColorFamily)

    methods = {
        "base": Method("the word", train),
        "other": Method("another", train, {"max_train_steps": 10}, {"max_train_steps": 400}),
    }
    monkeypatch.setattr(personalization, "METHODS", methods)
    monkeypatch.setattr(personalization.Scorer, "default", ColorScorer)
    monkeypatch.setattr(
        personalization,
        "draw_prior",
        lambda *a: ColorFamily().sample(["rose"], seed=0, steps=1, guidance=1, batch=1),
    )
    out, work = tmp_path / "rows.jsonl", tmp_path / "work"

    def run(*more):
        arguments = ["--subjects", str(subjects_file), "--out", str(out), "--work", str(work)]
        return personalization.main([*arguments, *more])

    run.trained, run.out = trained, out
    return run


def test_a_row_is_made_once(command):
    assert command("--seeds", "0,1", "--methods", "base,other", "--subjects_count", "2") == 0
    assert len(command.trained) == 2 * 2 * 2
    rows = personal_tables.read_rows(command.out)
    assert len(rows) == 2 * 2 * 2 + 2 * len(personalization.CONTROLS)
    assert {r["bytes"] for r in rows if r["method"] == "other"} == {7}
    with command.out.open("a") as file:
        file.write('{"torn')
    assert command("--seeds", "0,1", "--methods", "base,other", "--subjects_count", "2") == 0
    assert len(command.trained) == 8
    assert command("--seeds", "0", "--methods", "other", "--steps_scale", "0.5") == 0
    assert [options["max_train_steps"] for *_, options in command.trained[8:]] == [5, 5, 5]
    assert len(personal_tables.read_rows(command.out)) == 12 + 3 + len(personalization.CONTROLS)
    assert command("--seeds", "0", "--methods", "other", "--full") == 0
    assert command.trained[-1][2] == {"max_train_steps": 400}


def test_a_mean_with_its_standard_error():
    assert personal_tables.with_error([0.0104], 3) == "+0.010"
    assert personal_tables.with_error([-0.25, -0.25], 4) == "-0.2500 +- 0.0000"
    assert personal_tables.with_error([0.0, 0.01, 0.02], 4) == f"+0.0100 +- {0.01 / 3**0.5:.4f}"


def test_the_spread_over_seeds_is_of_the_same_subjects():
    """A subject with one seed moves the mean of all, not that of its seed."""
    made = [("rose", 0, 0.3), ("rose", 1, 0.5), ("lamp", 0, 0.9)]
    rows = [{"method": "m", "subject": s, "seed": i, "fidelity": f} for s, i, f in made]
    [line] = personal_tables.summary(rows, {"m": "M"})["rows"]
    assert line[:4] == ["M", 2, 2, f"0.650 +- {0.02**0.5:.3f}"]
    [line] = personal_tables.summary(rows[1:], {"m": "M"})["rows"]
    assert line[3] == "0.700"


def test_tables_and_grid(command):
    assert command("--seeds", "0,1,2", "--methods", "base,other") == 0
    text = section(command.out.with_suffix(".json"))
    assert "| another | 3 | 3 | " in text and "Difference to the word" in text
    assert "mean colour" in text and "personalization" in text
    grid = command.out.with_suffix(".png")
    first = grid.read_bytes()
    with Image.open(grid) as whole:
        size = whole.size
    rows = personal_tables.read_rows(command.out)
    pictures = command.out.parent / "work" / "pictures"
    gone = [row["key"] for row in rows if row["method"] == "other" and row["seed"] == 2]
    for key in gone:
        (pictures / f"{key}.png").unlink()
    assert command("--seeds", "0", "--methods", "base") == 0
    with Image.open(grid) as another:
        assert another.size == size  # of another seed
    first = grid.read_bytes()
    for drawn in pictures.iterdir():
        drawn.unlink()
    assert command("--seeds", "0", "--methods", "base") == 0
    assert grid.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--methods", "magic"], "methods: must be among"),
        (["--seeds", "a"], "seeds: must be integers"),
        (["--steps_scale", "0"], "steps_scale: must be above 0"),
        (["--subjects_count", "9"], "subjects_count: must be from 1 to the 3"),
    ],
)
def test_bad_arguments(command, capsys, arguments, told):
    assert command(*arguments) == 2
    assert told in capsys.readouterr().err


def test_methods_have_one_budget():
    counts = {}
    for name, method in METHODS.items():
        if method.train is learn:
            share = 3 if by_backpropagation(make_config(method.options)) else 1
            steps = method.options["max_train_steps"]
            counts[name] = share * steps * pictures_a_step(method.options)
    assert len(counts) == len(METHODS) - 1
    assert all(0.95 * BUDGET <= n <= BUDGET for n in counts.values()), counts
    for method in METHODS.values():
        assert method.resolved(1, True).get("max_train_steps", 1) >= 1


def test_the_key_knows_every_option():
    a, b = (personalization.facts(METHODS[name], 1, False) for name in ("zoodip", "zoodip-n4"))
    assert a["options"]["zo_n"] == 2 and b["options"]["zo_n"] == 4
    assert a["options"]["max_train_steps"] == BUDGET // 3 and "seed" not in a["options"]


@pytest.mark.parametrize(
    "name", ["zoodip", "ti-backprop", "tuneqdm-zo", "qlora", "selective-bp-low"]
)
def test_a_method_learns_on_the_shipped_model(subjects_file, tmp_path, name):
    subject, *_ = read_subjects(subjects_file, lambda word: True)
    options = METHODS[name].resolved(1, False) | {"max_train_steps": 1}
    learned = learn(options, Job(subject, 0, "persona/assets/tiny-sd", tmp_path))
    assert learned.forwards >= 1 and learned.result_bytes > 1000
    assert (learned.backwards > 0) == (name in ("ti-backprop", "qlora", "selective-bp-low"))
    assert (learned.base is None) == (name in ("zoodip", "ti-backprop"))
    drawing = Drawing(steps=1, held_out=1, trained=1)
    assert len(draw(learned.family, subject, learned.word, 0, drawing).held_out) == 1


def test_drawing_is_part_of_the_key():
    one = personalization.row_key({"drawing": Drawing().facts()})
    other = dataclasses.replace(Drawing(), steps=3).facts()
    assert one != personalization.row_key({"drawing": other})
