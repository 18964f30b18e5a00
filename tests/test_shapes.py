"""Scenes, their pictures and their questions agree, never repeat, and cannot be answered blind."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from umm.data._scenes import BACKGROUNDS, COLOURS, SHAPES, count_table, sample_scene
from umm.data.shapes import ShapesSource
from umm.errors import ConfigError, DataError
from umm.settings import ShapesSettings

SOURCE = ShapesSource(ShapesSettings(), "train")
KINDS = {"existence", "count", "attribute", "relation", "comparison"}


# --------------------------------------------------------------------------------------------------------- pictures


def test_pictures_masks_and_labels_agree_with_the_scene():
    for index in range(150):
        scene, item = SOURCE.scene(index), SOURCE[index]
        mask, image = item["mask"].numpy(), item["image"].numpy()
        assert sorted(set(np.unique(mask)) - {0}) == sorted({SHAPES.index(thing.shape) + 1 for thing in scene.things})
        for thing in scene.things:
            row, column = int(thing.y * 64), int(thing.x * 64)
            assert mask[row, column] == SHAPES.index(thing.shape) + 1
            assert tuple(image[:, row, column]) == thing.rgb
            assert np.abs(np.array(thing.rgb) - COLOURS[thing.colour]).max() <= 7
        assert item["label"] == SHAPES.index(scene.things[0].shape)


def area(mask: np.ndarray, thing, size: int) -> int:
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    return int(((np.hypot(x - thing.x, y - thing.y) < thing.radius + 1 / size) & (mask > 0)).sum())


def test_the_label_is_the_shape_that_covers_most():
    for index in range(200):
        scene, mask = SOURCE.scene(index), SOURCE[index]["mask"].numpy()
        areas = [area(mask, thing, 64) for thing in scene.things]
        assert all(areas[0] > 1.4 * other for other in areas[1:])
        assert min(areas) >= 40, "an object of fewer than 40 pixels can hardly be told from another"
        assert sum(areas) == (mask > 0).sum()


@pytest.mark.parametrize("size", [48, 64, 128])
def test_drawn_areas_follow_the_geometry(size):
    """Circle, square and triangle have areas that a formula gives."""
    factor = {"circle": math.pi * 0.88**2, "square": 2.0, "triangle": 3 * math.sqrt(3) / 4}
    source = ShapesSource(ShapesSettings(image_size=size, max_objects=2), "val")
    ratios = [
        area(source[index]["mask"].numpy(), thing, size) / (factor[thing.shape] * (thing.radius * size) ** 2)
        for index in range(40)
        for thing in source.scene(index).things[:1]
        if thing.shape in factor
    ]
    assert np.abs(np.array(ratios) - 1).max() < 0.06


def test_objects_neither_overlap_nor_leave_the_picture():
    for index in range(300):
        things = sample_scene(3, "train", index, max_objects=5).things
        for a in things:
            assert a.radius < a.x < 1 - a.radius and a.radius < a.y < 1 - a.radius
            assert all(a is b or math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius for b in things)


def test_colours_are_far_from_each_other_and_from_every_background():
    from skimage.color import rgb2lab

    def lab(rgb):
        return rgb2lab(np.array(rgb, float) / 255)

    objects = np.stack([lab(rgb) for rgb in COLOURS.values()])
    tones = np.stack([lab(tone) for n in range(1500) for tone in sample_scene(0, "train", n).background.tones])
    between = np.linalg.norm(objects[:, None] - objects, axis=-1) + 1e3 * np.eye(len(objects))
    assert between.min() > 30
    assert np.linalg.norm(objects[:, None] - tones, axis=-1).min() > 30


def test_every_background_is_drawn_and_shows_two_tones():
    source = ShapesSource(ShapesSettings(textured=1.0), "train")
    seen = Counter(source.scene(index).background.kind for index in range(200))
    assert set(seen) == set(BACKGROUNDS) and min(seen.values()) > 25
    for index in range(20):
        background = source[index]["image"][:, source[index]["mask"] == 0].float()
        assert background.std(dim=1).max() > 3


# ------------------------------------------------------------------------------------------------- reproducibility


def test_a_scene_is_a_function_of_seed_split_and_number():
    again = ShapesSource(ShapesSettings(train=10, questions=6), "train")
    for index in (0, 7):
        for key, value in SOURCE[index].items():
            other = again[index][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key
    assert sample_scene(0, "train", 5) == sample_scene(0, "train", 5)
    first = sample_scene(0, "train", 0)
    assert (first.things[0].shape, first.things[0].colour, len(first.things)) == ("square", "orange", 3)


def test_no_scene_occurs_twice_within_or_across_splits_and_seeds():
    scenes = [
        tuple((t.shape, t.colour, round(t.x, 4), round(t.y, 4)) for t in sample_scene(seed, split, index).things)
        for seed in (0, 1)
        for split in ("train", "val", "test")
        for index in range(1000)
    ]
    assert len(set(scenes)) == len(scenes)


def test_ids_are_unique_and_limits_hold():
    splits = ("train", "val", "test")
    sources = [ShapesSource(ShapesSettings(limit=50, seed=seed), split) for split in splits for seed in (0, 1)]
    ids = [name for source in sources for name in source.ids]
    assert len(ids) == len(set(ids)) == 300
    assert [item["id"] for item in sources[0].stream(45)] == sources[0].ids[45:]
    with pytest.raises(IndexError):
        sources[0][50]


# ---------------------------------------------------------------------------------------------------------- balance


def test_classes_numbers_and_themes_are_uniform():
    scenes = [sample_scene(0, "train", index) for index in range(6000)]
    for counted, options in [
        (Counter(scene.label for scene in scenes), 6),
        (Counter(len(scene.things) for scene in scenes), 4),
        (Counter(scene.theme_count for scene in scenes), 4),
        (Counter(thing.colour for scene in scenes for thing in scene.things[:1]), 8),
    ]:
        assert len(counted) == options
        assert all(abs(number / 6000 - 1 / options) < 0.02 for number in counted.values())


@pytest.mark.parametrize("max_objects", [2, 3, 4, 5])
def test_the_table_of_counts_has_uniform_margins(max_objects):
    bounds = [0.0, *(bound for bound, _ in count_table(max_objects))]
    cells = {pair: bounds[k + 1] - bounds[k] for k, (_, pair) in enumerate(count_table(max_objects))}
    assert all(probability < 1e-12 for (number, sharing), probability in cells.items() if sharing > number)
    for axis in (0, 1):
        margins = defaultdict(float)
        for pair, probability in cells.items():
            margins[pair[axis]] += probability
        assert len(margins) == max_objects
        assert all(abs(margin - 1 / max_objects) < 1e-3 for margin in margins.values())


def template_of(text: str) -> str:
    """The wording with shapes, colours and relations blanked."""
    text = re.sub("|".join(COLOURS), "C", text.replace("an ", "a "))
    text = re.sub("|".join(f"{s}(?:e?s)?" for s in SHAPES), "S", text)
    return re.sub("to the left of|to the right of|above|below", "R", text)


def options_of(question) -> int:
    """Between how many answers a blind guesser cannot decide."""
    text = question.text
    if question.answer in ("yes", "no") or text.startswith(("Which", "What size")):
        return 2
    return {"What s": len(SHAPES), "What c": len(COLOURS), "How ma": 4}[text[:6]]


@functools.cache
def asked(split: str) -> list:
    settings = ShapesSettings(train=2000, val=1500, image_size=24)
    return [question for item in ShapesSource(settings, split).stream() for question in item["questions"]]


def majority(questions, key) -> dict[str, str]:
    votes = defaultdict(Counter)
    for question in questions:
        votes[key(question.text)][question.answer] += 1
    return {text: counted.most_common(1)[0][0] for text, counted in votes.items()}


@pytest.mark.parametrize("by", ["template", "wording"])
def test_a_guesser_that_sees_only_the_question_stays_at_chance(by, capsys):
    """Majority answers of 2,000 scenes, judged on 1,500 others: within 3 points (or 4 standard errors) of chance."""
    by_template = majority(asked("train"), template_of)
    by_wording = majority(asked("train"), str) if by == "wording" else {}
    figures = {}
    for kind in sorted(KINDS):
        questions = [question for question in asked("val") if question.kind == kind]
        guesses = [by_wording.get(q.text, by_template[template_of(q.text)]) for q in questions]
        right = np.mean([guess == q.answer for guess, q in zip(guesses, questions)])
        chance = np.mean([1 / options_of(q) for q in questions])
        figures[kind] = f"{100 * right:.1f} % (chance {100 * chance:.1f} %, {len(questions)})"
        assert right < chance + max(0.03, 4 * math.sqrt(chance * (1 - chance) / len(questions))), kind
    with capsys.disabled():
        print(f"\nblind guesser by {by}: {figures}")


def test_yes_and_no_are_equally_frequent_for_every_template():
    answers = defaultdict(Counter)
    for question in asked("train") + asked("val"):
        if question.answer in ("yes", "no"):
            answers[template_of(question.text)][question.answer] += 1
    assert len(answers) >= 8
    for template, counted in answers.items():
        number = counted.total()
        assert abs(counted["yes"] / number - 0.5) < 4 * 0.5 / math.sqrt(number), template


# ------------------------------------------------------------------------------------- an independent second opinion


def described(scene, words: str) -> list:
    """Things that a noun phrase fits, read word by word."""
    words = re.sub("(objects?|shapes?)$", "", words.strip()).split()
    fits = list(scene.things)
    for word in words:
        stem = next((s for s in SHAPES if word in (s, s + "s", s + "es")), word)
        fits = [thing for thing in fits if stem in (thing.shape, thing.colour, thing.size)]
    return fits


def only(scene, words: str):
    fits = described(scene, words)
    assert len(fits) == 1, f"'{words}' is ambiguous"
    return fits[0]


def beside(a, relation: str, b) -> bool:
    gap = {"to the left of": b.x - a.x, "to the right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]
    assert abs(gap) > 0.05, "too close to say"
    return gap > 0


def solve(scene, text: str) -> str:
    """The answer worked out from the words and the scene alone, by other means than the generator's."""
    where = "to the left of|to the right of|above|below"
    if found := re.fullmatch(r"Is there an? (.*)\?", text):
        return "yes" if described(scene, found[1]) else "no"
    if found := re.fullmatch(r"How many (.*) are there\?", text):
        return str(len(described(scene, found[1])))
    if found := re.fullmatch(rf"What (shape|colour) is the object ({where}) the (.*)\?", text):
        others = [t for t in scene.things if t is not only(scene, found[3])]
        there = [thing for thing in others if beside(thing, found[2], only(scene, found[3]))]
        assert len(there) == 1
        return getattr(there[0], found[1])
    if found := re.fullmatch(r"What (shape|colour|size) is the (.*)\?", text):
        return getattr(only(scene, found[2]), found[1])
    if found := re.fullmatch(rf"Is the (.*) ({where}) the (.*)\?", text):
        return "yes" if beside(only(scene, found[1]), found[2], only(scene, found[3])) else "no"
    if found := re.fullmatch(r"Are there more (.*) than (.*)\?", text):
        counts = [len(described(scene, words)) for words in found.groups()]
        assert counts[0] != counts[1]
        return "yes" if counts[0] > counts[1] else "no"
    if found := re.fullmatch(r"Is the (.*) larger than the (.*)\?", text):
        a, b = (only(scene, words) for words in found.groups())
        assert a.size != b.size
        return "yes" if a.radius > b.radius else "no"
    found = re.fullmatch(r"Which is larger, the (.*) or the (.*)\?", text)
    winner = max(found.groups(), key=lambda words: only(scene, words).radius)
    return winner.removesuffix(" object")


def test_every_answer_is_what_an_independent_reader_works_out():
    kinds, texts = Counter(), 0
    for index in range(1500):
        scene, questions = SOURCE.scene(index), SOURCE[index]["questions"]
        for question in questions:
            assert solve(scene, question.text) == question.answer, (question, scene)
            kinds[question.kind] += 1
        texts += len({question.text for question in questions}) - len(questions)
    assert texts == 0, "a scene asks the same thing twice"
    assert set(kinds) == KINDS and min(kinds.values()) > 900


def test_captions_name_every_object_with_size_colour_shape_and_place():
    places = {
        (column, row): phrase
        for (column, row), phrase in zip(
            [(c, r) for r in range(3) for c in range(3)],
            ["at the top left", "at the top", "at the top right", "on the left", "in the centre", "on the right"]
            + ["at the bottom left", "at the bottom", "at the bottom right"],
        )
    }
    for index in range(200):
        scene, text = SOURCE.scene(index), SOURCE[index]["caption"]
        body, background = re.fullmatch(r"A (.*), on a (\w+) background\.", text).groups()
        clauses = re.split(r", a | and a ", body)
        expected = [f"{t.size} {t.colour} {t.shape} {places[int(t.x * 3), int(t.y * 3)]}" for t in scene.things]
        assert clauses == expected
        assert background == scene.background.kind


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "change, message",
    [
        ({"flip": True}, "name places"),
        ({"crop": "random"}, "name places"),
        ({"max_objects": 6}, "2 to 5"),
        ({"image_size": 8}, "24"),
    ],
)
def test_settings_that_cannot_hold_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ShapesSource(ShapesSettings(**change), "train")


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match="train, val, test"):
        ShapesSource(ShapesSettings(), "dev")


def test_the_identity_changes_with_whatever_changes_the_pictures():
    base = ShapesSettings()
    facts = ShapesSource(base, "val").identity()
    for change in ({"seed": 1}, {"image_size": 32}, {"max_objects": 3}, {"textured": 0.0}, {"limit": 5}):
        assert ShapesSource(dataclasses.replace(base, **change), "val").identity() != facts
    assert ShapesSource(base, "test").identity() != facts
