"""Crash-safe files: one winner, no half files, nothing left behind."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from codebook_schemas.files import create_exclusively, replace_atomically, sha256_of


def test_one_of_fifty_creates_the_file(tmp_path: Path) -> None:
    path = tmp_path / "marker"
    with ThreadPoolExecutor(50) as pool:
        won = list(pool.map(lambda i: create_exclusively(path, str(i).encode() * 1000), range(50)))
    assert sum(won) == 1
    assert path.read_bytes() == str(won.index(True)).encode() * 1000
    assert os.listdir(tmp_path) == ["marker"]


def test_a_failed_replacement_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_atomically(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            replace_atomically(path, b"new")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["file"])
    replace_atomically(path, b"new")
    assert sha256_of(path) == hashlib.sha256(b"new").hexdigest()


def test_a_link_whose_answer_was_lost_has_won(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over NFS: the client repeats the call, and the server refuses the repetition."""
    link = os.link

    def repeated(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", repeated)
    assert create_exclusively(tmp_path / "marker", b"mine")
    assert not create_exclusively(tmp_path / "marker", b"mine")  # of equal bytes, too, one wins
    assert (tmp_path / "marker").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["marker"]
