"""A codebook of a stranger is looked at on a terminal: nothing in it moves the cursor, hides text or fills the screen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import hostile
from codebook_builder import cli as build_cli
from codebook_prune import cli as prune_cli
from codebook_prune.codebook import Codebook
from codebook_schemas import UserError
from codebook_schemas.errors import MAX_ITEMS, one_line, shown

EVIL = "a\x1b[2Jb\x9b31mc\u202ed\re\nf\u2028g\x00" + "x" * 100_000


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A codebook whose every free string is hostile; its files are sound."""
    hostile.small_codebook(tmp_path / "book")
    path = tmp_path / "book/manifest.json"
    data = json.loads(path.read_text())
    data["model"] |= {"id": EVIL, "revision": EVIL, "family": EVIL, "fingerprint": EVIL}
    data |= {"source": EVIL, "config_hash": EVIL, "libraries": {EVIL: EVIL}, "feature": EVIL}
    data["counts"] = {f"{EVIL[:60]}{i}": 10**4000 + i for i in range(1000)}
    del data["checksum"]
    path.write_text(json.dumps(data))
    return tmp_path / "book"


def printed(
    command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    with pytest.raises(SystemExit) as ended:
        build_cli.main() if command == "codebook-build" else prune_cli.main(arguments)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out + said.err


@pytest.mark.parametrize("command", ["codebook-build", "codebook-prune"])
@pytest.mark.parametrize("as_json", [True, False])
def test_inspecting_prints_nothing_of_a_strangers(
    command: str, as_json: bool, book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = printed(command, ["inspect", str(book), *(["--json"] if as_json else [])], monkeypatch, capsys)
    assert code == 0, text[:500]
    assert all(line.isprintable() for line in text.split("\n"))
    assert len(text) < 60_000
    assert "48" in text
    if as_json:
        found: dict[str, Any] = json.loads(text)
        assert found["model"]["id"].startswith("a\ufffd[2Jb\ufffd31mc\ufffdd e f")
        assert len(found["counts"]) == MAX_ITEMS + 1


def test_errors_print_nothing_of_a_strangers(
    book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message that names both models."""
    hostile.small_codebook(book.parent / "own")
    arguments = ["merge", str(book.parent / "own"), str(book), "--output", str(book.parent / "new")]
    code, text = printed("codebook-build", arguments, monkeypatch, capsys)
    assert code == 2
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert text.rstrip("\n").isprintable()
    assert len(text) < 2100
    assert prune_cli.complain(EVIL) == 2
    said = capsys.readouterr().err
    assert said.rstrip("\n").isprintable()
    assert len(said) < 2100


def test_what_is_harmless_is_shown_as_it_is() -> None:
    value = {"a": 1, "b": [1.5, None], "c": {"d": "text", "e": True}, "f": 2**62}
    assert shown(value) == value
    assert shown("x" * 2000) == one_line("x" * 2000, 1000)


def test_a_codebook_says_nothing_of_a_strangers(book: Path) -> None:
    loaded = Codebook.from_pretrained(book)
    assert repr(loaded).isprintable()
    assert len(repr(loaded)) < 300
    for adapter in (SimpleNamespace(hidden_size=3), SimpleNamespace(hidden_size=hostile.DIMENSION, family="llava")):
        with pytest.raises(UserError) as caught:
            loaded.check_model(adapter)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500
