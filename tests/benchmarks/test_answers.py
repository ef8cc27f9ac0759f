"""Answers are kept under everything they depend on, and found again only then."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codebook_folder import write_codebook

from benchmarks import digests
from benchmarks.answers import Work, identity
from benchmarks.digests import ANSWERS, CODEBOOKS, digest_of, files_digest
from benchmarks.exam import Taken
from codebook_prune import Codebook, CodebookDiversityPruner, ContextPruner, DivPrunePruner, RandomPruner, RateCurve


@dataclass
class Asked:
    """Stands for an exam, and counts how often it was taken."""

    digest: str
    right: str = "101"
    times: int = 0

    def take(self, pruner: Any) -> Taken:
        self.times += 1
        return np.array(list(self.right)) == "1", {"tokens_final": 72.0}


def book(folder: Path, model: Any, seed: int) -> Codebook:
    prototypes = torch.randn(5, 128, generator=torch.Generator().manual_seed(seed))
    return Codebook.from_pretrained(write_codebook(folder / f"{len(list(folder.iterdir()))}", model, prototypes))


def take(work: Work, asked: Asked, pruner: Any) -> Taken:
    return work.take(asked, pruner, "a label")  # type: ignore[arg-type]


def test_an_answer_is_found_again(tmp_path: Path) -> None:
    first = take(Work(tmp_path), Asked("a"), RandomPruner(keep_ratio=0.5))
    again = Asked("a")
    found = take(Work(tmp_path), again, RandomPruner(keep_ratio=0.5))
    assert again.times == 0
    assert found[0].tolist() == first[0].tolist() == [True, False, True]
    assert found[1] == {"tokens_final": 72.0}


@pytest.mark.parametrize("pruner", [None, RandomPruner(keep_ratio=0.5, seed=1), RandomPruner(keep_ratio=0.5, min_keep=2)])
def test_another_pruner_or_question_is_asked(tmp_path: Path, pruner: Any) -> None:
    work = Work(tmp_path)
    take(work, Asked("a"), RandomPruner(keep_ratio=0.5))
    for other, given in ((Asked("a"), pruner), (Asked("b"), RandomPruner(keep_ratio=0.5))):
        take(work, other, given)
        assert other.times == 1


def test_a_pruner_is_told_by_all_of_its_fields(tmp_path: Path, reference: tuple[Any, Any]) -> None:
    one, same, other = (book(tmp_path, reference[0], seed) for seed in (0, 0, 1))
    assert repr(one) == repr(other)  # what a codebook holds is not in its repr
    ours = CodebookDiversityPruner(one, keep_ratio=0.22)
    assert identity(ours) == identity(CodebookDiversityPruner(same, keep_ratio=0.22))
    different = [
        ours,
        CodebookDiversityPruner(other, keep_ratio=0.22),
        CodebookDiversityPruner(one, keep_ratio=0.22, spread=0.4),
        CodebookDiversityPruner(one, keep_ratio=0.22, positions="compact"),
        ours | ContextPruner(p=0.3),
        ours | ContextPruner(p=RateCurve(0, 0, 0.3)),
        ours | ContextPruner(p=RateCurve(0, 0, 0.2)),
        DivPrunePruner(keep_ratio=0.22),
        None,
    ]
    assert len({identity(pruner) for pruner in different}) == len(different)
    with pytest.raises(TypeError, match="list_iterator"):
        identity(iter([]))


def test_code_and_weights_are_part_of_the_file_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "a.py").write_text("x = 1")
    before = files_digest([folder])
    (folder / "notes.txt").write_text("")
    assert files_digest([folder]) == before
    (folder / "a.py").write_text("x = 2")
    changed = files_digest([folder])
    (folder / "a.py").rename(folder / "b.py")
    assert len({before, changed, files_digest([folder])}) == 3
    own = Work(tmp_path / "work").path
    monkeypatch.setattr(digests, "CHECKPOINT", tmp_path)
    assert Work(tmp_path / "work").path != own
    assert digest_of(ANSWERS) != digest_of(CODEBOOKS)


def test_every_file_that_is_named_exists() -> None:
    assert all((digests.ROOT / path).exists() for path in (*ANSWERS, *CODEBOOKS))


def test_a_line_cut_short_is_asked_again_and_spoils_no_other(tmp_path: Path) -> None:
    work = Work(tmp_path)
    take(work, Asked("a"), None)
    take(work, Asked("b"), None)
    work.path.write_text(work.path.read_text()[:-20])
    cut = Asked("b")
    take(Work(tmp_path), cut, None)
    assert cut.times == 1
    for name in "ab":
        take(Work(tmp_path), asked := Asked(name), None)
        assert asked.times == 0


def _write(folder: Path, name: str) -> None:
    work = Work(folder)
    for number in range(20):
        take(work, Asked(f"{name}{number}", "10" * 3000), None)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        list(pool.map(_write, [tmp_path] * 2, "ab"))
    work = Work(tmp_path)
    assert len(work.done) == 40
    assert all(len(json.loads(line)["right"]) == 6000 for line in work.path.read_text().splitlines() if line)
