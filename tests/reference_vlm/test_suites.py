"""Prompts of several pictures, videos and texts: right answers, honest texts, and packing that equals the real prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from reference_vlm.evaluate import inputs_of
from reference_vlm.model import build_processor, build_tokenizer, vocabulary
from reference_vlm.packing import IGNORE, KINDS, Packer, Sheet, make_sheet
from reference_vlm.questions import NUMBERS
from reference_vlm.scenes import GLYPHS, GRID, PATCH, Item, Scene, render
from reference_vlm.suites import ORDINALS, SUITES, WAYS, Prompt, facts, make_suite, make_video


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


def test_every_suite_uses_known_words_only() -> None:
    known = set(vocabulary())
    for suite in SUITES:
        for prompt in make_suite(suite, "train", 8):
            text = " ".join((prompt.question.text, prompt.question.answer, prompt.context, *prompt.lead)).lower()
            for mark in "?.:":
                text = text.replace(mark, f" {mark} ")
            assert set(text.split()) <= known


def test_answers_about_several_pictures_are_right() -> None:
    for prompt in make_suite("images", "test", 40):
        words, answer = prompt.question.text.lower().rstrip("?").split(), prompt.question.answer
        if prompt.question.family == "which":
            has = [any(o.name == " ".join(words[-2:]) for o in s.objects) for s in prompt.scenes]
            assert has.count(True) == 1
            assert ORDINALS[has.index(True)] == answer
            continue
        objects = prompt.scenes[ORDINALS.index(words[-2])].objects
        if prompt.question.family == "count_of":
            assert NUMBERS.index(answer) == len(objects)
        elif prompt.question.family == "color_of":
            assert [o.color for o in objects if o.shape == words[-5]] == [answer]
        elif prompt.question.family == "position_of":
            assert quarters(objects, " ".join(words[3:5])) == [answer]
        else:
            assert [o.shape for o in objects if o.color in words and o.shape == answer] == [answer]


def quarters(objects: Sequence[Item], name: str) -> list[str]:
    """Where the objects of a name are on the full canvas."""
    middle = GRID * PATCH / 2
    found = [o.center for o in objects if o.name == name]
    return [f"{'top' if y < middle else 'bottom'} {'left' if x < middle else 'right'}" for x, y in found]


def test_places_are_asked_in_the_frame_the_question_names() -> None:
    differ = 0
    for prompt in make_suite("video", "test", 40, ("position_in",)):
        words = prompt.question.text.lower().rstrip("?").split()
        at = ORDINALS.index(words[-2])
        name = " ".join(words[3:5])
        assert quarters(prompt.scenes[at].objects, name) == [prompt.question.answer]
        differ += any(quarters(s.objects, name) != [prompt.question.answer] for s in prompt.scenes)
    assert differ, "no question depends on its frame"


def moved(a: Scene, b: Scene) -> np.ndarray:
    """Columns and rows of the pixels that differ."""
    return np.argwhere((np.asarray(render(a)) != np.asarray(render(b))).any(-1))


def test_videos_move_one_object_as_the_answer_says() -> None:
    seen = set()
    for prompt in make_suite("video", "test", 30, ("motion",)):
        first, *_, last = prompt.scenes
        dx, dy = WAYS[prompt.question.answer]
        a, b = first.objects[0], last.objects[0]
        assert (np.sign(b.x - a.x), np.sign(b.y - a.y)) == (dx, dy)
        assert abs(b.x - a.x) + abs(b.y - a.y) >= max(2 * PATCH, a.size)
        assert a.name in prompt.question.text
        assert all(s.objects[1:] == first.objects[1:] and s.glyph == first.glyph for s in prompt.scenes)
        changed = moved(first, last)  # nothing but the moving object looks different
        low, high = (min(a.y, b.y), min(a.x, b.x)), (max(a.y, b.y) + a.size, max(a.x, b.x) + a.size)
        assert len(changed)
        assert (changed >= low).all()
        assert (changed < high).all()
        seen.add(prompt.question.answer)
    assert seen == set(WAYS)


def test_a_video_without_room_is_no_video() -> None:
    assert any(make_video("train", i, 4, (2, 2)) is None for i in range(20))


def test_texts_mislead_and_never_hold_the_answer() -> None:
    for prompt in make_suite("text", "test", 10):
        words = prompt.context.lower().replace(".", " ").split()
        assert not set(prompt.question.answer.split()) & set(words)
        assert 128 <= len(prompt.context.split()) < 1024 + 20
    assert set(GLYPHS) & set(facts(np.random.default_rng(0), 400).replace(".", "").split())


def test_splits_do_not_overlap() -> None:
    def drawn(split: str) -> set[bytes]:
        return {render(s).tobytes() for suite in SUITES for p in make_suite(suite, split, 3) for s in p.scenes}

    assert not drawn("test") & drawn("validation")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_questions_are_the_prompts_users_send(kind: str, processor: Any) -> None:
    """The shared prefix and each segment, joined, are the processor's token ids for that single question."""
    pack = Packer(build_tokenizer())
    rng = np.random.default_rng(3)
    sheet = make_sheet(kind, 11, {"images": 3, "video": 4}.get(kind, 1), (12, 12), 60 if kind == "text" else 0, rng)
    batch = pack([sheet])
    prefix = len(pack.prefix(sheet))
    at = prefix
    for question in sheet.questions:
        alone = inputs_of(processor, [Prompt(sheet.scenes, question, sheet.lead, sheet.context)])["input_ids"][0]
        length = len(alone) - prefix
        assert torch.equal(torch.cat([batch["ids"][0, :prefix], batch["ids"][0, at : at + length]]), alone)
        assert torch.equal(batch["positions"][0, at : at + length], torch.arange(prefix, len(alone)))
        answer = len(pack.segments(Sheet(sheet.scenes, (question,)))[0][0]) - length
        assert (batch["labels"][0, at : at + length] == IGNORE).all()
        assert torch.equal(
            batch["labels"][0, at + length : at + length + answer], batch["ids"][0, at + length : at + length + answer]
        )
        sees = batch["mask"][0, 0, at + length - 1] == 0
        expected = torch.zeros_like(sees)
        expected[:prefix] = True
        expected[at : at + length] = True
        assert torch.equal(sees, expected)
        at += length + answer
