"""The accuracy table: budgets are what they say, answers equal a user's, interrupted runs go on, intervals are intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codebook_folder import write_codebook

from benchmarks.accuracy import Exam, Work, interval, lead
from benchmarks.methods import METHODS, Setting, stage_ratio
from codebook_prune import Codebook
from reference_vlm.evaluate import answers, is_right
from reference_vlm.suites import make_suite


@pytest.fixture(scope="module")
def exam(reference: tuple[Any, Any]) -> Exam:
    return Exam(*reference, make_suite("image", "validation", 1))


@pytest.fixture(scope="module")
def codebook(reference: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Codebook:
    prototypes = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    return Codebook.from_pretrained(write_codebook(tmp_path_factory.mktemp("book") / "codebook", reference[0], prototypes))


@pytest.mark.parametrize("ratio", [0.5, 0.22, 0.056])
@pytest.mark.parametrize("name", METHODS)
def test_methods_spend_the_same_average(name: str, ratio: float, exam: Exam, codebook: Codebook) -> None:
    layers = exam.model.config.get_text_config().num_hidden_layers
    pruner = METHODS[name](Setting(codebook, ratio, layers, 0))
    if pruner is None:  # nothing it could do costs so little
        assert name in {"FastV", "PyramidDrop", "codebook | pyramid"}
        assert ratio < 0.5 or name == "codebook | pyramid"
        return
    _, counts = exam.take(pruner)
    assert counts["tokens_entering"] >= counts["tokens_final"]
    assert counts["tokens_layer_avg"] == pytest.approx(144 * ratio, abs=3 if name == "smaller picture" else 1)


def test_stage_ratio_solves_its_equation() -> None:
    for average in (0.3, 0.5, 0.9):
        x = stage_ratio(average)
        assert x is not None
        assert (1 + x + x**2 + x**3) / 4 == pytest.approx(average, abs=1e-5)
    assert stage_ratio(0.25) is None


def test_encoding_images_once_changes_no_answer(reference: tuple[Any, Any]) -> None:
    prompts = make_suite("images", "validation", 2)
    right, counts = Exam(*reference, prompts).take(None)
    plain = [is_right(p.question, a) for p, a in zip(prompts, answers(*reference, prompts, batch=16), strict=True)]
    assert right.tolist() == plain
    assert counts["tokens_final"] == 144


def test_work_is_kept_by_everything_it_depends_on(tmp_path: Path) -> None:
    right = np.array([True, False, True])
    book = tmp_path / "book"
    book.mkdir()
    (book / "manifest.json").write_text("{}")
    Work(tmp_path, book, seed=0).put(("image", "random", 0.5), right, {"tokens_final": 72.0})
    found = Work(tmp_path, book, seed=0).get(("image", "random", 0.5))
    assert found is not None
    assert found[0].tolist() == right.tolist()
    assert found[1] == {"tokens_final": 72.0}
    assert Work(tmp_path, book, seed=1).get(("image", "random", 0.5)) is None
    (book / "manifest.json").write_text("{ }")
    assert Work(tmp_path, book, seed=0).get(("image", "random", 0.5)) is None


def test_interval_holds_the_ratio_and_shrinks_with_agreement() -> None:
    full = np.array([True, False] * 200)
    assert interval(full, full, 0) == (100.0, 100.0)
    half = full & (np.arange(400) % 4 == 0)
    low, high = interval(full, half, 0)
    assert low < 50 < high


def test_the_lead_is_a_paired_difference() -> None:
    full, ours, other = (np.zeros(1000, bool) for _ in range(3))
    full[:800], ours[:600], other[:400] = True, True, True
    found = lead(full, ours, other, 0)
    assert found["ours_ahead"] == pytest.approx(25)
    assert found["ours_ahead_ci95"][0] < 25 < found["ours_ahead_ci95"][1]
    assert lead(full, ours, ours, 0)["ours_ahead_ci95"] == (0, 0)
    assert lead(full, other, ours, 0)["ours_ahead_ci95"][1] < 0
