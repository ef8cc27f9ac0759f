"""The shipped checkpoint is an ordinary, good model; training resumes exactly."""

from __future__ import annotations

import json
from argparse import Namespace
from itertools import accumulate
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from reference_vlm import CHECKPOINT
from reference_vlm.evaluate import accuracy, answers, object_tokens, random_tokens
from reference_vlm.suites import SUITES, make_suite
from reference_vlm.train import Stage, train


def test_it_is_an_ordinary_llava_that_auto_classes_load() -> None:
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(processor, LlavaProcessor)
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert model.config.text_config.num_hidden_layers >= 8
    assert model.config.image_seq_length >= 144
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 25 << 20
    assert all(value.dtype == torch.float16 for value in load_file(CHECKPOINT / "model.safetensors").values())


FAMILIES = ("color", "shape", "exist", "position", "count")


ASKED = {"image": 40, "images": 24, "video": 24, "text": 18}
"""Suite -> questions of each family: a few hundred in all."""
BAR = {"color": 0.9, "shape": 0.9, "exist": 0.9, "position": 0.75, "count": 0.75}
"""What the model has to reach to be of any use, by what is asked: also behind texts, and of one picture among several."""
MISSED = {("text", "position")}
"""Bars the shipped weights do not reach, as their card says. A model that reaches one fails here until it is taken out."""
RARE = 1e-3
"""How often a model that is as good as it should be may fail in one family."""


def kind(family: str) -> str:
    """What a family asks for: "color" of "color_of", which asks about one picture among several."""
    return family.partition("_")[0]


def least_right(n: int, share: float) -> int:
    """The `RARE` quantile of the binomial: who is right with probability `share` hardly ever has fewer right of `n`."""
    below = accumulate(comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1))
    return next(k for k, probability in enumerate(below) if probability > RARE)


def test_least_right_is_the_binomial_s() -> None:
    assert [least_right(40, share) for share in (1.0, 0.9, 0.5)] == [40, 29, 10]  # summed as fractions, apart


@pytest.fixture(scope="module")
def right(reference: tuple[Any, Any]) -> dict[tuple[str, str], int]:
    """(suite, family) -> right answers to its first questions of the test split."""
    found = {}
    for suite, number in ASKED.items():
        items = make_suite(suite, "test", number)
        scores = accuracy(items, answers(*reference, items, batch=64 if suite == "image" else 16))
        found |= {(suite, family): round(scores[family] * number) for family in SUITES[suite][1]}
    return found


@pytest.mark.parametrize(("suite", "family"), [(s, f) for s in SUITES for f in SUITES[s][1]])
def test_it_answers_as_well_as_its_card_says(suite: str, family: str, right: dict[tuple[str, str], int]) -> None:
    card = json.loads((CHECKPOINT / "scores.json").read_text())["accuracy"]
    assert right[suite, family] >= least_right(ASKED[suite], card[suite][family])


@pytest.mark.parametrize(
    ("suite", "family"),
    [
        pytest.param(s, f, marks=[pytest.mark.xfail(strict=True, reason="a known miss")] if (s, f) in MISSED else [])
        for s in SUITES
        for f in SUITES[s][1]
        if kind(f) in BAR
    ],
)
def test_it_reaches_the_first_bar(suite: str, family: str, right: dict[tuple[str, str], int]) -> None:
    assert right[suite, family] >= least_right(ASKED[suite], BAR[kind(family)])


def test_its_answers_hang_on_the_objects_tokens(reference: tuple[Any, Any]) -> None:
    """What makes pruning results mean something: see the sanity checks of reference_vlm.evaluate."""
    model, processor = reference
    items = make_suite("image", "validation", 24, FAMILIES)
    share = {
        "full": accuracy(items, answers(model, processor, items))["overall"],
        "objects": accuracy(items, answers(model, processor, items, keep=lambda s, k: object_tokens(s)))["overall"],
        "as many random": accuracy(
            items, answers(model, processor, items, keep=lambda s, k: random_tokens(int(object_tokens(s).sum()), k))
        )["overall"],
        "background": accuracy(items, answers(model, processor, items, keep=lambda s, k: ~object_tokens(s)))["overall"],
    }
    assert share["objects"] > share["as many random"] > share["background"], share
    assert share["objects"] >= 0.7 * share["full"], share


def test_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str) -> None:
        settings = {"vision_steps": 2, "steps": 3, "budget": 400, "lr": 1e-3, "width": 64, "device": "cpu"}
        train(Namespace(out=tmp_path / name, compiled=False, start=None, first=0, **settings))

    run("whole")
    saved = Stage.save

    def save_and_stop(stage: Stage) -> None:
        saved(stage)
        if stage.name == "language" and stage.step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "save", save_and_stop)
    monkeypatch.setattr(Stage.run, "__defaults__", (1,))
    with pytest.raises(KeyboardInterrupt):
        run("halves")
    monkeypatch.undo()
    run("halves")
    whole, halves = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("whole", "halves"))
    for name, value in whole.items():
        np.testing.assert_allclose(value.float().numpy(), halves[name].float().numpy(), atol=2e-3, err_msg=name)
