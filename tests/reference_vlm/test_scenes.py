"""Scenes and questions: deterministic, splits apart, answers right by an independent look at the scene."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from reference_vlm.model import vocabulary
from reference_vlm.questions import FAMILIES, NUMBERS, ask, ask_many
from reference_vlm.scenes import BACKGROUNDS, COLORS, GRID, PATCH, SHAPES, SPLITS, make_scene, patch_labels, render


def digest(split: str, index: int) -> str:
    return hashlib.sha256(np.asarray(render(make_scene(split, index))).tobytes()).hexdigest()


def test_a_scene_is_the_same_every_time() -> None:
    assert digest("test", 5) == digest("test", 5)
    assert make_scene("test", 5) == make_scene("test", 5)


def test_splits_share_no_scene() -> None:
    seen = [digest(split, index) for split in SPLITS for index in range(40)]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("index", range(60))
def test_objects_lie_inside_and_apart(index: int) -> None:
    scene = make_scene("train", index, size=None)
    items = [*scene.objects, *([scene.glyph] if scene.glyph else [])]
    assert 1 <= len(scene.objects) <= 5
    for item in items:
        assert item.x >= 0
        assert item.x + item.size <= scene.columns * PATCH
        assert item.y >= 0
        assert item.y + item.height <= scene.rows * PATCH
    taken = np.zeros((scene.rows * PATCH, scene.columns * PATCH), int)
    for item in items:
        taken[item.y : item.y + item.height, item.x : item.x + item.size] += 1
    assert taken.max() == 1
    assert int(scene.visible.sum()) == scene.columns * scene.rows


def test_visual_lengths_vary_down_to_icons() -> None:
    lengths = [int(make_scene("train", i, size=None).visible.sum()) for i in range(400)]
    assert min(lengths) == 4
    assert max(lengths) == GRID * GRID
    assert len(set(lengths)) > 30


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_objects_pixels_have_its_colour(background: str) -> None:
    scene = make_scene("validation", 11, background=background)
    pixels = np.asarray(render(scene)).astype(int)
    names = list(COLORS)
    palette = np.array([COLORS[n] for n in names])
    for item in scene.objects:
        box = pixels[item.y : item.y + item.size, item.x : item.x + item.size].reshape(-1, 3)
        near = (abs(box[:, None] - palette).max(-1) <= 16).sum(0)
        assert names[int(near.argmax())] == item.color


def test_dense_labels_name_the_item_under_a_patch() -> None:
    scene = make_scene("train", 3)
    labels = patch_labels(scene)
    for item in scene.objects:
        column, row = (int(c // PATCH) for c in item.center)
        patch = row * GRID + column
        if item.shape != "ring":  # a ring's centre shows the background
            assert labels["shape"][patch] == 1 + SHAPES.index(item.shape)
            assert labels["color"][patch] == 1 + list(COLORS).index(item.color)
            assert abs(labels["offset"][patch]).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("index", range(40))
def test_answers_are_right(index: int) -> None:
    scene = make_scene("test", index)
    rng = np.random.default_rng(index)
    shapes, colors = (Counter(getattr(o, k) for o in scene.objects) for k in ("shape", "color"))
    for question in (q for family in FAMILIES for _ in range(3) if (q := ask(scene, family, rng)) is not None):
        words = question.text.lower().replace("?", "").replace(".", "").split()
        if question.family == "color":
            shape = next(w for w in words if w in SHAPES)
            assert [o.color for o in scene.objects if o.shape == shape] == [question.answer]
        elif question.family == "shape":
            color = next(w for w in words if w in COLORS)
            assert [o.shape for o in scene.objects if o.color == color] == [question.answer]
        elif question.family == "count":
            asked = [w for w in words if w in SHAPES or w in COLORS]
            number = (shapes | colors)[asked[0]] if asked else len(scene.objects)
            assert NUMBERS[number] == question.answer
        elif question.family == "exist":
            assert ((words[-2], words[-1]) in {(o.color, o.shape) for o in scene.objects}) == (question.answer == "yes")
        elif question.family == "position":
            item = next(o for o in scene.objects if o.name == " ".join(words[-2:]))
            vertical, horizontal = question.answer.split()
            assert (vertical == "top") == (item.center[1] < GRID * PATCH / 2)
            assert (horizontal == "left") == (item.center[0] < GRID * PATCH / 2)
        elif question.family == "read":
            assert question.answer == scene.glyph_text
        elif question.family == "label":
            assert question.answer == max(scene.objects, key=lambda o: o.size).name
        elif question.family == "describe":
            assert all(o.name in question.answer for o in scene.objects)


def test_yes_and_no_are_balanced() -> None:
    for family in ("exist", "relation"):
        rng = np.random.default_rng(0)
        given = [q.answer for i in range(600) if (q := ask(make_scene("test", i), family, rng)) is not None]
        assert 0.42 < given.count("yes") / len(given) < 0.58


def test_every_word_is_in_the_vocabulary() -> None:
    known = set(vocabulary())
    rng = np.random.default_rng(0)
    for index in range(60):
        for question in ask_many(make_scene("train", index, size=None), 10, rng):
            words = f"{question.text} {question.answer}".lower().replace("?", " ?").replace(".", " .").split()
            assert set(words) <= known
