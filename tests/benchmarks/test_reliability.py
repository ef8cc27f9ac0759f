"""Fault trials can be done in pieces: those of one commit add up in one file, those of others do not count."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults, reliability


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["reliability.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        reliability.main()
    return int(ended.value.code or 0)


HOSTILE = {"part": "hostile", "seed": 0, "commit": "old", "findings": []}


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results with trials of another commit and of another seed. Trials take minutes; here they only say what was asked."""
    others = [{"part": "faults", "seed": seed, "commit": "old", "trial": 0, "problem": "", "struck": True} for seed in (0, 1)]
    (tmp_path / "reliability.json").write_text(json.dumps({"rows": [HOSTILE, *others]}))

    def trials(planned: Sequence[faults.Planned], seed: int) -> Iterator[dict[str, Any]]:
        for number, fault, moment in planned:
            if number == 3 and not (tmp_path / "interrupted").exists():
                (tmp_path / "interrupted").touch()
                raise KeyboardInterrupt
            yield {"trial": number, "fault": fault, "drawn": moment, "problem": "", "struck": True}

    monkeypatch.setattr(faults, "trials", trials)
    monkeypatch.setattr(reliability, "RESULTS", tmp_path)
    monkeypatch.setattr(faults.os, "geteuid", lambda: 0)
    at(monkeypatch, "new")
    return tmp_path / "reliability.json"


def at(monkeypatch: pytest.MonkeyPatch, commit: str, dirty: bool = False) -> None:
    envelope = reliability.envelope([], 0)
    monkeypatch.setattr(reliability, "envelope", lambda rows, seed: envelope | {"commit": commit, "dirty": dirty})


def trials_of(path: Path, seed: int = 0) -> list[tuple[int, str]]:
    rows = json.loads(path.read_text())["rows"]
    return [(row["trial"], row["commit"]) for row in rows if (row["part"], row["seed"]) == ("faults", seed)]


def test_trials_of_one_commit_add_up_until_there_are_enough(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth is interrupted."""
    assert run(monkeypatch, "faults", "--count", "9", "--now", "1") == 0
    assert trials_of(stored) == [(0, "new")]  # the one of the other commit does not count
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "faults", "--count", "9")
    assert trials_of(stored) == [(n, "new") for n in range(3)]
    for _ in range(2):
        assert run(monkeypatch, "faults", "--count", "9") == 0
        assert trials_of(stored) == [(n, "new") for n in range(9)]
    rows = json.loads(stored.read_text())["rows"]
    assert rows[0] == HOSTILE
    assert [(row["fault"], row["drawn"]) for row in rows[2:]] == [planned[1:] for planned in faults.plan(0, 9)]
    assert trials_of(stored, seed=1) == [(0, "old")]


def test_another_commit_starts_anew_unless_it_is_told_to_resume(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stored.parent / "interrupted").touch()
    assert run(monkeypatch, "faults", "--count", "4", "--now", "1", "--resume") == 0
    assert trials_of(stored) == [(0, "old"), (1, "new")]
    at(monkeypatch, "newer")
    assert run(monkeypatch, "faults", "--count", "4", "--now", "1", "--resume") == 0
    assert trials_of(stored) == [(0, "old"), (1, "new"), (2, "newer")]
    at(monkeypatch, "newer", dirty=True)
    assert run(monkeypatch, "faults", "--count", "4") == 0
    assert trials_of(stored) == [(n, "newer-dirty") for n in range(4)]


def test_a_trial_that_finds_something_is_told_and_kept(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        faults, "trials", lambda planned, seed: iter([{"trial": 0, "fault": "node", "problem": "digest", "struck": True}])
    )
    assert run(monkeypatch, "faults", "--now", "1") == 1
    monkeypatch.setattr(
        faults, "trials", lambda planned, seed: iter([{"trial": 1, "fault": "node", "problem": "", "struck": True}])
    )
    assert run(monkeypatch, "faults", "--now", "1") == 1  # the other piece stays wrong
    assert [row["problem"] for row in json.loads(stored.read_text())["rows"] if row["commit"] == "new"] == ["digest", ""]


def test_a_trial_whose_fault_came_too_late_is_run_again(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stored.parent / "interrupted").touch()
    late = {"trial": 0, "fault": "node", "problem": "", "struck": False}
    asked = faults.trials
    monkeypatch.setattr(faults, "trials", lambda planned, seed: iter([late]))
    assert run(monkeypatch, "faults", "--now", "1") == 0
    monkeypatch.setattr(faults, "trials", asked)
    assert run(monkeypatch, "faults", "--count", "2") == 0
    assert trials_of(stored) == [(0, "new"), (1, "new")]


def test_the_whole_suite_has_every_fault_and_every_moment() -> None:
    whole = faults.plan(0, 30)
    assert [planned.number for planned in whole] == list(range(30))
    assert {planned.fault for planned in whole} == set(faults.FAULTS)
    assert {planned.moment for planned in whole} == set(faults.MOMENTS)
    assert all(planned.moment in faults.PROBING for planned in whole if planned.fault in ("worker", "late node"))
    assert faults.plan(0, 9) == whole[:9]
    assert faults.plan(1, 30) != whole
    assert min([planned.fault for planned in whole].count(fault) for fault in faults.FAULTS) == 30 // len(faults.FAULTS)


def test_the_full_disk_is_left_to_root(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (stored.parent / "interrupted").touch()
    monkeypatch.setattr(faults.os, "geteuid", lambda: 1000)
    assert run(monkeypatch, "faults", "--count", "14") == 0
    assert capsys.readouterr().err.count("only root can bring about a disk full") == 2
    assert len(trials_of(stored)) == 12


def test_the_moment_is_read_off_the_files(tmp_path: Path) -> None:
    trial = faults.Trial(None, tmp_path / "t", tmp_path, None)  # type: ignore[arg-type]
    done = [f"book.run/parts/_done/{n}.json" for n in range(faults.SHARDS)]
    files = ["book.run/calibration/part-a", "book.run/parts/part-a", *done]
    files += [".book.1.tmp/x", ".book.1.tmp/README.md", "book/manifest.json"]
    found = [trial.moment()]
    for name in files:
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).touch()
        found.append(trial.moment())
    assert tuple(found) == faults.ORDER


def test_the_files_of_a_build_are_compared_without_what_is_random(tmp_path: Path) -> None:
    for attempt in range(2):
        (tmp_path / f"part-00000-s-{attempt}-{'0' * 31}{attempt}.parquet").touch()
    (tmp_path / ".x.tmp").mkdir()
    assert faults.names_of(tmp_path) == {"part-00000-s.parquet": 2}
