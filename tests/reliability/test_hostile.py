"""Codebooks from strangers: whatever is in the files, loading ends in one clear line or in a sound codebook."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import hostile
from codebook_builder import artefact
from codebook_builder.artefact import Origin, Prototypes
from codebook_builder.commit import Encoder, Marker, marker_path, read_marker
from codebook_prune.codebook import Codebook
from codebook_prune.index import ShardedIndex
from codebook_schemas import BuildConfig, CodebookManifest, UserError
from codebook_schemas.errors import one_line
from codebook_schemas.inputs import InputManifest, ShardEntry


def test_every_kind_of_hostile_copy_is_refused_or_sound() -> None:
    """In one child process under a memory limit; `benchmarks.reliability` tries thousands."""
    found = hostile.summary(list(hostile.attempts(126)))
    assert found["findings"] == []
    assert found["kinds"] == 21
    assert found["refused"] > 80


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "book"
    hostile.small_codebook(folder)
    return folder


def copy(book: Path, folder: Path, **changed: bytes | None) -> Path:
    """A forged copy with some files replaced, or left out; keys name them as in `hostile`."""
    files = hostile.read_files(book)
    for key, data in changed.items():
        name = getattr(hostile, key)
        files.pop(name)
        if data is not None:
            files[name] = data
    hostile.forge(files)
    hostile.write_files(folder, files)
    return folder


def test_a_forged_copy_without_changes_loads(book: Path, tmp_path: Path) -> None:
    """So the refusals here are not for the forging."""
    assert hostile.load(copy(book, tmp_path)) == hostile.load(book)


@pytest.mark.parametrize("left", [28, 37, 200, 600, -8, -1])
def test_a_short_index_never_reaches_faiss(book: Path, tmp_path: Path, left: int) -> None:
    """FAISS 1.15 ends the process when a mapped index is shorter than its header says."""
    folder = copy(book, tmp_path, INDEX=(book / hostile.INDEX).read_bytes()[:left])
    with pytest.raises(UserError, match="not a flat inner-product index"):
        ShardedIndex(folder, CodebookManifest.read(folder))


def test_an_index_of_nan_is_not_answered_from(book: Path, tmp_path: Path) -> None:
    data = bytearray((book / hostile.INDEX).read_bytes())
    data[82 : 82 + 4 * hostile.DIMENSION * hostile.ROWS_PER_SHARD] = np.full(320, np.nan, np.float32).tobytes()
    index = ShardedIndex(folder := copy(book, tmp_path, INDEX=bytes(data)), CodebookManifest.read(folder))
    queries = np.ones((2, hostile.DIMENSION), np.float32)
    assert index.search(queries, 20)[1].min() >= hostile.ROWS_PER_SHARD
    with pytest.raises(UserError, match="holds NaN"):
        index.search(queries, 21)


def test_an_accident_in_the_manifest_is_found(book: Path, tmp_path: Path) -> None:
    text = (book / "manifest.json").read_text()
    hostile.write_files(tmp_path, hostile.read_files(book) | {"manifest.json": text.replace("0.5", "0.7").encode()})
    with pytest.raises(UserError, match="differs from its checksum"):
        Codebook.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", hostile.NAMES)
def test_no_name_leads_out_of_the_folder(book: Path, tmp_path: Path, name: str) -> None:
    """A sound file with the right hash lies where the names lead."""
    folder = copy(book, tmp_path / "book")
    (tmp_path / hostile.OUTSIDE).write_bytes((book / hostile.TENSORS).read_bytes())
    data = json.loads((folder / "manifest.json").read_text())
    data["files"][name] = data["files"].pop(hostile.TENSORS)
    data["parts"][0]["prototypes"] = name
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError) as caught:
        Codebook.from_pretrained(folder)
    assert one_line(caught.value, 2000) == str(caught.value)


def test_no_folder_of_a_copy_is_somewhere_else(book: Path, tmp_path: Path) -> None:
    """An index/ that links to another folder: nothing there is read, written or deleted."""
    folder = copy(book, tmp_path / "book")
    (folder / "index").rename(tmp_path / "elsewhere")
    (folder / "index").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "shard-99999.faiss").write_bytes(b"of someone else")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    manifest = CodebookManifest.read(folder)
    origin = Origin(model=manifest.model, thresholds=manifest.thresholds, counts={})
    new = Prototypes(torch.ones(1, hostile.DIMENSION), torch.ones(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), None)
    for use in (
        lambda: ShardedIndex(folder, manifest), lambda: artefact.verify(folder),
        lambda: artefact.extend(folder, new, origin, 4),
        lambda: Codebook.from_pretrained(folder).save_pretrained(tmp_path / "x"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="lies behind a link to another folder"):
            use()
    assert artefact.collect_garbage(folder, -5) == []
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_pipe_for_a_manifest_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="not a regular file"):
        CodebookManifest.read(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("../x") | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
SHARD = ShardEntry(name="00000-a.tar", path="/a.tar", bytes=1, sha256="a" * 64, samples=3)


def read_config(path: Path) -> BuildConfig:
    return BuildConfig.from_file(path)


def read_manifest(path: Path) -> CodebookManifest:
    return CodebookManifest.read(path.rename(path.with_name("manifest.json")).parent)


def read_a_marker(path: Path) -> Marker | None:
    target = marker_path(path.parent, SHARD.name)
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    return read_marker(path.parent, SHARD.name)


MARKER = Marker(
    file="part-x.parquet", bytes=1, sha256="0" * 64, rows=1, images=1, input_sha256="i", probe_hash="p",
    encoder=Encoder(family="llava", fingerprint="f", dimension=4),
)  # fmt: skip
PARSERS: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "config": (read_config, BuildConfig(model="m", shards=("a.tar",), output="o").model_dump(mode="json")),
    "inputs": (InputManifest.read, InputManifest(shards=(SHARD,)).model_dump(mode="json")),
    "marker": (read_a_marker, MARKER.model_dump(mode="json")),
    "manifest": (read_manifest, {}),
}


def parses_or_refuses(parser: str, folder: Path, data: bytes) -> None:
    """One line of printable text is the only error."""
    (folder / "file").write_bytes(data)
    said = ""
    try:
        PARSERS[parser][0](folder / "file")
    except UserError as error:
        said = str(error)
    assert one_line(said, 2000) == said


def small(name: str, book: Path) -> dict[str, Any]:
    base: dict[str, Any] = PARSERS[name][1] or json.loads((book / "manifest.json").read_text())
    base.pop("checksum", None)
    return json.loads(json.dumps(base))


@pytest.mark.parametrize("parser", PARSERS)
def test_any_value_anywhere_is_taken_or_refused_in_one_line(
    parser: str, book: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(place=st.integers(0, 10_000), value=VALUES, key=st.none() | st.text(max_size=12))
    def attempt(place: int, value: Any, key: str | None) -> None:
        data = small(parser, book)
        holder, at = (places := hostile._places(data))[place % len(places)]
        holder[key if key is not None and isinstance(holder, dict) else at] = value
        parses_or_refuses(parser, tmp_path_factory.mktemp(parser), json.dumps(data).encode())

    attempt()


@pytest.mark.parametrize("parser", PARSERS)
def test_any_bytes_are_refused_in_one_line(parser: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    odd = [b"\xff\xfe", b"9" * 5000, b"[" * 1_500, b"{" * 1_500, b"a: &a [*a]", b"a: 2001-13-45", b"? {a: 1}\n: 2",
           b"!!python/object/apply:os.system [id]", b"- " * 300, b"a: !!int 'x'", b"\0", b"a: !!timestamp 1"]  # fmt: skip

    @settings(max_examples=50, deadline=None)
    @given(
        data=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")) | st.sampled_from(odd)
    )
    def attempt(data: bytes) -> None:
        parses_or_refuses(parser, tmp_path_factory.mktemp(parser), data)

    for data in odd:
        parses_or_refuses(parser, tmp_path_factory.mktemp(parser), data)
    attempt()
