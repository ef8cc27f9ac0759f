"""The shipped checkpoint is an ordinary, good model; training resumes exactly."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from reference_vlm import CHECKPOINT
from reference_vlm.evaluate import accuracy, answers, object_tokens, random_tokens
from reference_vlm.suites import make_suite
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


def test_it_answers_as_well_as_its_card_says(reference: tuple[Any, Any]) -> None:
    card = json.loads((CHECKPOINT / "scores.json").read_text())
    items = make_suite("image", "test", 40, FAMILIES)
    found = accuracy(items, answers(*reference, items))
    for family in FAMILIES:
        assert found[family] >= card["accuracy"]["image"][family] - 0.15, family  # 40 questions: three standard errors


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
        train(Namespace(out=tmp_path / name, compiled=False, start=None, **settings))

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
