"""What a result says of itself can be run again."""

from __future__ import annotations

import shlex

import pytest

from benchmarks.report import envelope


def test_the_command_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--only", "codebook only, original positions", "spread 0.4", "--methods", "codebook and diversity | pyramid"]
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/ablation.py", *words])
    command = envelope([], 0)["command"]
    assert shlex.split(command) == ["python", "-m", "benchmarks.ablation", *words]
    assert "'spread 0.4'" in command
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/accuracy.py"])
    assert envelope([], 0)["command"] == "python -m benchmarks.accuracy"
