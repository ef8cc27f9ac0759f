"""Fault trials can be done in pieces: they add up in one file, and the least tried fault comes next."""

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


def test_trials_add_up_until_there_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials themselves take minutes; here they only say what they were asked for, and the fourth is interrupted."""
    path = tmp_path / "reliability.json"
    kept = {"part": "hostile", "seed": 0, "findings": []}
    path.write_text(json.dumps({"rows": [kept, {"part": "faults", "seed": 1, "fault": "worker", "problem": ""}]}))
    interrupted: list[int] = []

    def trials(planned: Sequence[tuple[int, str]], seed: int) -> Iterator[dict[str, Any]]:
        for number, fault in planned:
            if number == 3 and not interrupted:
                interrupted.append(number)
                raise KeyboardInterrupt
            yield {"trial": number, "fault": fault, "problem": "digest" if fault == "node" else ""}

    monkeypatch.setattr(faults, "trials", trials)
    monkeypatch.setattr(reliability, "RESULTS", tmp_path)
    monkeypatch.setattr(faults.os, "geteuid", lambda: 0)
    assert run(monkeypatch, "faults", "--count", "9", "--now", "1") == 0
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "faults", "--count", "9")
    assert run(monkeypatch, "faults", "--count", "9") == 0
    assert run(monkeypatch, "faults", "--count", "9") == 0
    rows = json.loads(path.read_text())["rows"]
    assert rows[0] == kept
    assert [row["fault"] for row in rows[1:]] == [*faults.FAULTS, *faults.FAULTS[:2]]
    assert [row["trial"] for row in rows[2:]] == list(range(1, 9))


def test_a_trial_that_finds_something_is_told_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "trials", lambda planned, seed: iter([{"fault": "node", "problem": "digest"}]))
    monkeypatch.setattr(reliability, "RESULTS", tmp_path)
    assert run(monkeypatch, "faults", "--now", "1") == 1
    assert json.loads((tmp_path / "reliability.json").read_text())["rows"][0]["problem"] == "digest"
