"""The accuracy table: budgets are what they say, answers equal a user's, interrupted runs go on, intervals are intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codebook_folder import write_codebook

from benchmarks import OURS, accuracy
from benchmarks.accuracy import Exam, Work, interval, lead
from benchmarks.methods import METHODS, Setting, described, rows_of_suite, schedule, stage_ratio
from codebook_prune import Codebook, CodebookPruner, PyramidPruner, RandomPruner
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
    pruner = METHODS[name](Setting(codebook, codebook, ratio, layers, 0))
    if pruner is None:  # nothing it could do costs so little
        assert name == "FastV" or "PyramidDrop" in name or name.endswith("| pyramid")
        assert ratio < 0.5 or name.endswith("| pyramid")
        return
    assert ("compact" in schedule(pruner)) == (name.endswith("compact positions") or name == "smaller picture")
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
    key = ("image", "random", 0.5, described(RandomPruner(keep_ratio=0.5)))
    Work(tmp_path, book, seed=0).put(key, right, {"tokens_final": 72.0})
    found = Work(tmp_path, book, seed=0).get(key)
    assert found is not None
    assert found[0].tolist() == right.tolist()
    assert found[1] == {"tokens_final": 72.0}
    assert Work(tmp_path, book, seed=0).get((*key[:3], described(RandomPruner(keep_ratio=0.5, seed=1)))) is None
    assert Work(tmp_path, book, seed=1).get(key) is None
    (book / "manifest.json").write_text("{ }")
    assert Work(tmp_path, book, seed=0).get(key) is None


def test_answers_of_other_code_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "rule.py").write_text("keep = 1")
    monkeypatch.setattr(accuracy, "CODE", (*accuracy.CODE, "rule.py"))
    monkeypatch.setattr(accuracy, "ROOT", tmp_path)
    names = []
    for text in ("keep = 1", "keep = 1", "keep = 2"):
        (tmp_path / "rule.py").write_text(text)
        names.append(Work(tmp_path, tmp_path).path.name)
    assert names[0] == names[1] != names[2]


def test_all_code_an_answer_depends_on_is_there() -> None:
    for pattern in accuracy.CODE:
        assert list(accuracy.ROOT.glob(pattern)), pattern


def test_a_pruner_is_described_by_all_that_it_does(codebook: Codebook) -> None:
    chain = CodebookPruner(codebook, keep_ratio=0.5) | PyramidPruner()
    assert described(chain) == described(CodebookPruner(codebook, keep_ratio=0.5) | PyramidPruner())
    assert "0x" not in described(chain)
    changed = (
        CodebookPruner(codebook, keep_ratio=0.5, min_keep=2),
        CodebookPruner(codebook, keep_ratio=0.5, positions="original"),
    )
    assert len({described(pruner) for pruner in (chain, chain.pruners[0], *changed)}) == 4


def test_long_texts_have_fewer_rows_and_some_rows_one_suite() -> None:
    names = {suite: set(rows_of_suite(suite, tuple(METHODS))) for suite in ("image", "images", "video", "text")}
    assert names["image"] == names["images"] == names["video"] - {"EVS"}
    assert names["text"] - names["image"] == {f"{OURS} | context"}
    assert len(names["text"]) < len(names["image"]) / 1.5


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
