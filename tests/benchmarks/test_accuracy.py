"""The accuracy table: budgets are what they say, answers equal a user's, interrupted runs go on, intervals are intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codebook_folder import write_codebook

from benchmarks import OURS
from benchmarks.accuracy import examine, interval, lead
from benchmarks.answers import Work
from benchmarks.exam import Exam
from benchmarks.methods import METHODS, SMALLER, Setting, positions_of, schedule_of, stage_ratio
from codebook_prune import Codebook
from reference_vlm.evaluate import answers, is_right
from reference_vlm.suites import SUITES, make_suite


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
    pruner = METHODS[name].make(Setting(codebook, ratio, layers, 0, codebook))
    if pruner is None:  # nothing it could do costs so little
        assert "pyramid" in name.lower() or name == "FastV"
        assert ratio < 0.5 or name.endswith("| pyramid")
        return
    assert ("compact" in positions_of(pruner)) == ("compact" in name or name in (SMALLER, "codebook, paper-exact"))
    assert schedule_of(pruner, layers)
    _, counts = exam.take(pruner)
    assert counts["tokens_entering"] >= counts["tokens_final"]
    assert counts["tokens_layer_avg"] == pytest.approx(144 * ratio, abs=3 if name == SMALLER else 1)


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


def test_schedules_are_told(codebook: Codebook) -> None:
    def told(name: str, ratio: float) -> str:
        return schedule_of(METHODS[name].make(Setting(codebook, ratio, 8, 0)), 8)

    assert told("DivPrune", 0.22) == "0.22 from layer 0"
    assert told("FastV", 0.5) == "0.3333 from layer 2"
    assert told("PyramidDrop", 0.5).endswith(" from layer 6")
    assert told(f"{OURS} | pyramid", 0.22) == "0.4693 from layer 0 | 0.5 from layer 2, 0.25 from layer 4, 0.125 from layer 6"
    assert told(f"{OURS} | context", 0.22).startswith("0.22 from layer 0 | 0.3 of the text")


def test_every_suite_has_methods_and_ours_among_them() -> None:
    for suite in SUITES:
        assert OURS in [name for name, method in METHODS.items() if suite in method.suites]
    assert all(set(method.suites) <= set(SUITES) for method in METHODS.values())


def test_a_suite_is_examined_row_by_row(exam: Exam, codebook: Codebook, tmp_path: Path) -> None:
    pruners = {(0.22, name): METHODS[name].make(Setting(codebook, 0.22, 8, 0)) for name in (SMALLER, OURS)}
    rows = examine(exam, "image", pruners, Work(tmp_path), 0)
    families = 1 + len(SUITES["image"][1])
    assert [r["method"] for r in rows[::families]] == ["unpruned", SMALLER, OURS]
    assert [r["family"] for r in rows[:families]] == ["overall", *SUITES["image"][1]]
    assert "ours_ahead" in rows[families]
    assert rows[-1]["positions"] == "original"
    stored = (work := Work(tmp_path)).path.read_text()
    assert examine(exam, "image", pruners, work, 0) == rows
    assert work.path.read_text() == stored  # nothing was asked again


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
