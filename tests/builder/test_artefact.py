"""Codebooks as files: exact content, deterministic bytes, an index that answers as exact search does, safe changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from building import score_table
from safetensors.torch import load_file

from codebook_builder import artefact, cli
from codebook_builder.artefact import Origin, Prototypes, create, digest, extend, verify
from codebook_builder.merging import merge
from codebook_builder.provenance import read_provenance
from codebook_builder.quality import COVERED, index_recall, measure
from codebook_builder.select import Rule, embeddings_of, low_information
from codebook_prune.codebook import Codebook
from codebook_prune.index import ShardedIndex
from codebook_schemas import BuildConfig, CodebookManifest, ModelInfo, Quality, Thresholds, UserError
from codebook_schemas.tables import provenance_schema

DIMENSION = 6
MODEL = ModelInfo(id="org/model", family="llava", fingerprint="f" * 16)
LIMITS = Thresholds(top1_prob=0.5, influence=0.1, divergence="jsd")


def prototypes(rows: int = 10, seed: int = 0, provenance: bool = True) -> Prototypes:
    rng = np.random.default_rng(seed)
    table = score_table(images=1, tokens=max(rows, 4), seed=seed).slice(0, rows).drop_columns(["embedding", "cls_similarity"])
    cluster = rng.integers(0, 3, rows).astype(np.int32)
    support = rng.integers(1, 9, rows).astype(np.int32)
    table = (
        table.append_column("cluster", pa.array(cluster)).append_column("support", pa.array(support)).cast(provenance_schema())
    )
    vectors = torch.from_numpy(rng.normal(size=(rows, DIMENSION)).astype(np.float32))
    return Prototypes(vectors, torch.from_numpy(support), torch.from_numpy(cluster), table if provenance else None)


def origin(**changes: Any) -> Origin:
    return Origin(**({"model": MODEL, "thresholds": LIMITS, "counts": {"prototypes": 10}, "source": "inputs:one"} | changes))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_codebook_holds_what_was_given(tmp_path: Path) -> None:
    given = prototypes()
    manifest = create(tmp_path / "book", given, origin(), rows_per_shard=4)
    assert sorted(snapshot(tmp_path / "book")) == [
        "README.md", "index/shard-00000.faiss", "index/shard-00001.faiss", "index/shard-00002.faiss", "manifest.json",
        "prototypes.parquet", "prototypes.safetensors",
    ]  # fmt: skip
    book = Codebook.from_pretrained(tmp_path / "book")
    assert torch.equal(book.prototypes, given.vectors)
    assert torch.equal(book.support, given.support)
    assert torch.equal(book.cluster, given.cluster)
    assert load_file(tmp_path / "book/prototypes.safetensors")["cluster"].dtype == torch.int32
    table = read_provenance(tmp_path / "book", manifest)
    assert table is not None
    assert table.equals(given.provenance)
    assert verify(tmp_path / "book") == CodebookManifest.read(tmp_path / "book") == manifest
    assert not [p for p in tmp_path.iterdir() if p.name != "book"]


def test_the_sharded_index_answers_as_exact_search(tmp_path: Path) -> None:
    given = prototypes(rows=50)
    given.vectors[7] = given.vectors[3]  # a tie: the lower id answers
    manifest = create(tmp_path / "book", given, origin(), rows_per_shard=8)
    index = ShardedIndex(tmp_path / "book", manifest)
    queries = np.random.default_rng(1).normal(size=(200, DIMENSION)).astype(np.float32)
    queries[0] = given.vectors[3]
    unit = torch.nn.functional.normalize(given.vectors, dim=1).numpy()
    cosine = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ unit.T
    scores, ids = index.search(queries, 3)
    assert (ids == np.argsort(-cosine, axis=1, kind="stable")[:, :3]).all()
    np.testing.assert_allclose(scores, -np.sort(-cosine, axis=1)[:, :3], atol=1e-6)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        create(tmp_path / name, prototypes(), origin(), rows_per_shard=4)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    create(tmp_path / "c", prototypes(seed=1), origin(), rows_per_shard=4)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book").mkdir()
    create(tmp_path / "book", prototypes(), origin(), rows_per_shard=4)
    with pytest.raises(UserError, match="already exists"):
        create(tmp_path / "book", prototypes(), origin(), rows_per_shard=4)
    monkeypatch.setattr(artefact, "card", lambda manifest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        create(tmp_path / "other", prototypes(), origin(), rows_per_shard=4)
    assert [p.name for p in tmp_path.iterdir()] == ["book"]


def test_extending_adds_files_and_changes_none(tmp_path: Path) -> None:
    book, first, second = tmp_path / "book", prototypes(10), prototypes(5, seed=1)
    create(book, first, origin(), rows_per_shard=4)
    before = snapshot(book)
    manifest = extend(book, second, origin(source="inputs:two", counts={"prototypes": 5}), rows_per_shard=4)
    after = snapshot(book)
    assert {k: v for k, v in after.items() if k in before and k != "manifest.json"} == {
        k: v for k, v in before.items() if k != "manifest.json"
    }
    assert set(after) - set(before) == {
        "prototypes-00001.safetensors", "prototypes-00001.parquet", "index/shard-00003.faiss", "index/shard-00004.faiss",
    }  # fmt: skip
    assert (manifest.version, manifest.rows, manifest.counts["prototypes"]) == (2, 15, 15)
    loaded = Codebook.from_pretrained(book)
    assert torch.equal(loaded.prototypes, torch.cat([first.vectors, second.vectors]))
    shift = int(first.cluster.max()) + 1
    assert torch.equal(loaded.cluster, torch.cat([first.cluster, second.cluster + shift]))
    verify(book)
    index = ShardedIndex(book, manifest)
    _, ids = index.search(loaded.prototypes.numpy(), 1)
    assert ids[:, 0].tolist() == list(range(15))
    with pytest.raises(UserError, match="already"):
        extend(book, second, origin(source="inputs:two"), rows_per_shard=4)
    with pytest.raises(UserError, match="already"):
        extend(book, second, origin(source="inputs:one"), rows_per_shard=4)


def test_a_crash_while_extending_leaves_the_old_codebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = tmp_path / "book"
    create(book, prototypes(), origin(), rows_per_shard=4)
    old = digest(book)
    with monkeypatch.context() as patch:
        patch.setattr(CodebookManifest, "commit", lambda self, folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extend(book, prototypes(5, seed=1), origin(source="inputs:two"), rows_per_shard=4)
    assert digest(book) == old
    assert verify(book).rows == 10
    assert len(Codebook.from_pretrained(book)) == 10
    assert extend(book, prototypes(5, seed=1), origin(source="inputs:two"), rows_per_shard=4).rows == 15
    verify(book)


KILLED = """
import os, signal, sys
from test_artefact import *
calls, replace = iter(range(1, 9)), os.replace

def killing(*paths):
    if next(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)

os.replace = killing
extend(Path(sys.argv[1]), prototypes(5, seed=1), origin(source="inputs:two"), rows_per_shard=4)
"""


@pytest.mark.parametrize(("moment", "left"), [(1, 1), (5, 5)])  # at the first file written, at the manifest
def test_what_a_killed_extension_leaves_is_swept(
    tmp_path: Path, moment: int, left: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "book"
    create(book, prototypes(), origin(), rows_per_shard=4)
    (book / "notes.txt").write_text("not ours")
    before = snapshot(book)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, book, str(moment)], env=environment, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(snapshot(book).keys() - before.keys()) == left
    assert artefact.collect_garbage(book, 3600) == []
    monkeypatch.setattr(sys, "argv", ["codebook-build", "gc", str(book), "--grace-hours", "0", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out)["deleted"] == left
    assert snapshot(book) == before
    extend(book, prototypes(5, seed=1), origin(source="inputs:two"), rows_per_shard=4)
    assert verify(book).rows == 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL.model_copy(update={"id": "org/other"})}, "model org/model"),
        ({"model": MODEL.model_copy(update={"fingerprint": "0" * 16})}, "fingerprint"),
        ({"thresholds": LIMITS.model_copy(update={"divergence": "reference"})}, "divergence scale jsd"),
    ],
)
def test_what_does_not_belong_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    create(tmp_path / "a", prototypes(), origin(), rows_per_shard=4)
    create(tmp_path / "b", prototypes(seed=1), origin(**changes), rows_per_shard=4)
    with pytest.raises(UserError, match=message):
        extend(tmp_path / "a", prototypes(seed=1), origin(source="inputs:two", **changes), rows_per_shard=4)
    with pytest.raises(UserError, match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", 4)
    assert not (tmp_path / "c").exists()


def test_merging_keeps_every_prototype(tmp_path: Path) -> None:
    create(tmp_path / "a", prototypes(10), origin(), rows_per_shard=4)
    create(tmp_path / "b", prototypes(7, seed=1), origin(), rows_per_shard=4)
    manifest = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", 100)
    book = Codebook.from_pretrained(tmp_path / "c")
    assert torch.equal(book.prototypes, torch.cat([prototypes(10).vectors, prototypes(7, seed=1).vectors]))
    assert not set(book.cluster[:10].tolist()) & set(book.cluster[10:].tolist())
    table = read_provenance(tmp_path / "c", manifest)
    assert table is not None
    assert table["cluster"].to_pylist() == book.cluster.tolist()
    assert manifest.thresholds == LIMITS
    verify(tmp_path / "c")
    create(tmp_path / "d", prototypes(3, seed=2, provenance=False), origin(), rows_per_shard=4)
    assert read_provenance(tmp_path / "e", merge([tmp_path / "a", tmp_path / "d"], tmp_path / "e", 100)) is None
    with pytest.raises(UserError, match="twice"):
        merge([tmp_path / "a", tmp_path / "a"], tmp_path / "f", 4)
    with pytest.raises(UserError, match="at least two"):
        merge([tmp_path / "a"], tmp_path / "f", 4)


def test_every_damaged_file_is_found(tmp_path: Path) -> None:
    manifest = create(tmp_path / "book", prototypes(), origin(), rows_per_shard=4)
    for name in manifest.files:
        path = tmp_path / "book" / name
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="damaged"):
                verify(tmp_path / "book")
        path.unlink()
        with pytest.raises(UserError, match="missing"):
            verify(tmp_path / "book")
        path.write_bytes(whole)
    verify(tmp_path / "book")


def test_an_index_of_other_vectors_is_found(tmp_path: Path) -> None:
    create(tmp_path / "book", prototypes(), origin(), rows_per_shard=100)
    other = create(tmp_path / "other", prototypes(seed=1), origin(), rows_per_shard=100)
    name = "index/shard-00000.faiss"
    (tmp_path / "book" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    data = json.loads((tmp_path / "book/manifest.json").read_text())
    data["files"][name] = other.files[name].model_dump()
    del data["checksum"]
    (tmp_path / "book/manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="does not hold its prototypes"):
        verify(tmp_path / "book")


def test_quality_is_what_its_definition_says(tmp_path: Path) -> None:
    given, tables, rule = prototypes(30), [score_table(seed=s) for s in (3, 4)], Rule(0.6, 1.2, 1, 16)
    manifest = create(tmp_path / "book", given, origin(), rows_per_shard=8)
    book, index = Codebook.from_pretrained(tmp_path / "book"), ShardedIndex(tmp_path / "book", manifest)
    low = [low_information(t, rule)[1] for t in tables]
    counts = {"tokens": 96, "low_information": int(sum(mask.sum() for mask in low))}
    quality = measure(book, index, tables, rule, counts)
    unit = torch.nn.functional.normalize(given.vectors, dim=1).numpy()
    hits = total = 0
    for table, mask in zip(tables, low, strict=True):
        for vector, is_low in zip(embeddings_of(table), mask, strict=True):
            best = max(float(vector @ row / np.linalg.norm(vector)) for row in unit)
            hits, total = hits + bool(is_low and best >= COVERED), total + bool(is_low)
    assert quality.index_recall == 1.0
    assert quality.self_coverage == pytest.approx(hits / total, abs=1e-6)

    class Wrong:
        def search(self, block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            scores, ids = index.search(block, 2)
            return scores[:, 1:], ids[:, 1:]

    assert index_recall(book, Wrong(), embeddings_of(tables[0])) == 0.0  # type: ignore[arg-type]


def test_of_two_extensions_at_once_one_is_told_to_wait(tmp_path: Path) -> None:
    """The second comes while the first measures its quality, with its files written and its manifest not."""
    book = tmp_path / "book"
    create(book, prototypes(10), origin(), rows_per_shard=4)
    again = "is being changed by another process: nothing was done here, run the same command again when that has ended"

    def meanwhile(whole: Codebook, index: ShardedIndex) -> Quality:
        before = snapshot(book)
        with pytest.raises(UserError, match=again):
            extend(book, prototypes(7, seed=2), origin(source="inputs:three"), rows_per_shard=4)
        with pytest.raises(UserError, match=again):
            artefact.collect_garbage(book, -5)
        assert snapshot(book) == before
        return Quality()

    extend(book, prototypes(5, seed=1), origin(source="inputs:two", measure=meanwhile), rows_per_shard=4)
    assert verify(book).version == 2
    manifest = extend(book, prototypes(7, seed=2), origin(source="inputs:three"), rows_per_shard=4)
    assert (manifest.version, manifest.rows, manifest.source) == (3, 22, "inputs:one + inputs:two + inputs:three")
    assert verify(book) == manifest
    loaded = Codebook.from_pretrained(book).prototypes
    assert torch.equal(loaded, torch.cat([prototypes(n, seed=s).vectors for n, s in ((10, 0), (5, 1), (7, 2))]))


def test_extensions_that_race_lose_nothing(tmp_path: Path) -> None:
    book = tmp_path / "book"
    create(book, prototypes(10), origin(), rows_per_shard=4)

    def add(number: int) -> None:
        while True:
            try:
                extend(book, prototypes(4, seed=number), origin(source=f"inputs:{number}"), rows_per_shard=4)
            except UserError as error:
                if "by another process" not in str(error):
                    raise
            else:
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(8)))
    manifest = verify(book)
    assert (manifest.version, manifest.rows) == (9, 42)
    assert set(str(manifest.source).split(" + ")) == {"inputs:one", *(f"inputs:{number}" for number in range(8))}
    assert {name for name in snapshot(book) if name != "manifest.json"} == set(manifest.files)


def test_a_killed_extension_holds_no_lock(tmp_path: Path) -> None:
    book = tmp_path / "book"
    create(book, prototypes(), origin(), rows_per_shard=4)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, book, "5"], env=environment, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert extend(book, prototypes(5, seed=1), origin(source="inputs:two"), rows_per_shard=4).rows == 15
    verify(book)


def test_a_codebook_names_no_folder_of_its_builder(tmp_path: Path) -> None:
    home = tmp_path / "home" / "alice"
    config = BuildConfig(
        model=f"{home}/models/llava", shards=(f"{home}/data/s-{{000..003}}.tar", "s3://bucket/s.tar", "../x/t.tar"),
        output=f"{home}/books/book", seed=3,
    )  # fmt: skip
    model = MODEL.model_copy(update={"id": config.model})
    manifest = create(tmp_path / "book", prototypes(), origin(config=config, model=model), rows_per_shard=4)
    assert all(b"alice" not in data and str(tmp_path).encode() not in data for data in snapshot(tmp_path / "book").values())
    assert manifest.model.id == "llava"
    assert manifest.config is not None
    assert manifest.config.shards == ("s-{000..003}.tar", "s3://bucket/s.tar", "t.tar")
    assert (manifest.config.model, manifest.config.output, manifest.config.seed) == ("llava", "book", 3)
    assert manifest.config_hash == config.content_hash  # a rerun finds its own codebook by it
    assert "base_model" not in (tmp_path / "book/README.md").read_text()
    extend(tmp_path / "book", prototypes(5, seed=1), origin(source="inputs:two", model=model), rows_per_shard=4)
    assert verify(tmp_path / "book").rows == 15


@pytest.mark.parametrize("own", [None, "HASWELL"])
def test_loading_faiss_leaves_the_environment_as_it_was(own: str | None) -> None:
    code = (
        "import os; from codebook_prune.index import import_faiss; import_faiss(); print(os.environ.get('OPENBLAS_CORETYPE'))"
    )
    others = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    told = others | ({"OPENBLAS_CORETYPE": own} if own else {})
    done = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(own)
