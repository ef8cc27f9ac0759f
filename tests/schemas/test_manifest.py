"""Manifests: written atomically, read strictly, never naming a file outside their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from codebook_schemas import CodebookManifest, FileEntry, ModelInfo, Part, Thresholds, UserError
from codebook_schemas.inputs import InputManifest, ShardEntry
from codebook_schemas.manifest import base_name, model_name


def manifest(folder: Path) -> CodebookManifest:
    (folder / "p.safetensors").write_bytes(b"data")
    return CodebookManifest(
        model=ModelInfo(id="m", family="llava"), dimension=4, thresholds=Thresholds(divergence="jsd"),
        parts=(Part(prototypes="p.safetensors", rows=2),), files={"p.safetensors": FileEntry.of(folder / "p.safetensors")},
    )  # fmt: skip


def test_round_trip_and_verification(tmp_path: Path) -> None:
    given = manifest(tmp_path)
    given.commit(tmp_path)
    assert CodebookManifest.read(tmp_path) == given
    given.verify(tmp_path)
    (tmp_path / "p.safetensors").write_bytes(b"dat4")
    with pytest.raises(UserError, match=r"SHA-256 of p.safetensors"):
        given.verify(tmp_path)
    (tmp_path / "p.safetensors").write_bytes(b"dat")
    with pytest.raises(UserError, match=r"3 bytes"):
        given.verify(tmp_path)
    (tmp_path / "p.safetensors").unlink()
    with pytest.raises(UserError, match=r"missing"):
        given.verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "upgrade"),
        ({"surprise": 1}, "surprise: unknown key"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "leaves the codebook folder"),
        ({"files": {"/x": {"bytes": 1, "sha256": "0" * 64}}}, "leaves the codebook folder"),
        ({"files": {}}, "used but not listed"),
        ({"parts": []}, "parts"),
    ],
)
def test_damaged_manifests(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = json.loads(manifest(tmp_path).model_dump_json()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        CodebookManifest.read(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a codebook"):
        CodebookManifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"cannot read"):
        CodebookManifest.read(tmp_path)


def test_input_manifests(tmp_path: Path) -> None:
    entry = ShardEntry(name="00000-a.tar", path="/x/a.tar", bytes=1, sha256="0" * 64, samples=3)
    given = InputManifest(shards=(entry,))
    given.write(tmp_path / "i.json")
    assert InputManifest.read(tmp_path / "i.json") == given
    moved = InputManifest(shards=(entry.model_copy(update={"path": "/y/a.tar"}),))
    other = InputManifest(shards=(entry.model_copy(update={"sha256": "1" * 64}),))
    assert given.content_hash == moved.content_hash != other.content_hash
    for text, message in (("{", "cannot read"), ("{}", "damaged"), ('{"shards": []}', "damaged")):
        (tmp_path / "i.json").write_text(text)
        with pytest.raises(UserError, match=message):
            InputManifest.read(tmp_path / "i.json")
    with pytest.raises(ValueError, match=r"name"):
        ShardEntry(name="../../x", path="/x", bytes=1, sha256="0" * 64, samples=1)


def test_a_field_that_nothing_filled_may_still_be_there(tmp_path: Path) -> None:
    given = manifest(tmp_path)
    given.commit(tmp_path)
    data = json.loads((tmp_path / "manifest.json").read_text())
    del data["checksum"]
    data["quality"]["accuracy_retained"] = {}
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    assert CodebookManifest.read(tmp_path) == given
    data["quality"]["accuracy_retained"] = {"vqa": 1.0}
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"quality.accuracy_retained: unknown key"):
        CodebookManifest.read(tmp_path)


@pytest.mark.parametrize(
    ("given", "path", "model"),
    [
        ("/home/a/x", "x", "x"), ("/home/a/x/", "x", "x"), ("../x", "x", "x"), ("~/x", "x", "x"), ("org/x", "x", "org/x"),
        ("s3://b/x", "s3://b/x", "s3://b/x"), ("/d/s-{0..3}.tar", "s-{0..3}.tar", "s-{0..3}.tar"), ("x", "x", "x"),
    ],
)  # fmt: skip
def test_names_without_folders(given: str, path: str, model: str) -> None:
    assert (base_name(given), model_name(given)) == (path, model)
