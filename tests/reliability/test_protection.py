"""What the environment may and may not do to the embedded Ray's protection."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from building import small_config, write_config

from codebook_builder import cli, cluster


@pytest.mark.parametrize("mode", ["disabled", "k8s", "", "x\n\x1b[2J"])
def test_another_protection_than_a_token_is_refused(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    config = write_config(small_config("none.tar", tmp_path / "book"), tmp_path / "c.json")
    monkeypatch.setattr(sys, "argv", ["codebook-build", "run", str(config)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: RAY_AUTH_MODE is ")
    assert said.count("\n") == 1
    assert said.rstrip("\n").isprintable()
    assert not (tmp_path / "book.run").exists()


def test_a_given_token_is_kept_and_loopback_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    cluster._protect()
    assert os.environ["RAY_AUTH_TOKEN"] == "a" * 64
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    cluster._protect()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_AUTH_TOKEN"] != "b" * 64
