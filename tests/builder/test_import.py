"""Importing released prototypes: a small file of the same layout always, the real ones where they are at hand."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from codebook_builder.artefact import verify
from codebook_builder.importing import import_prototypes
from codebook_prune.codebook import Codebook
from codebook_prune.index import ShardedIndex
from codebook_schemas import UserError

RELEASED = Path(os.environ.get("CODEBOOK_PRUNE_RELEASED", "not given"))
META = {
    "model": "org/model", "source_images": ["a", "a", "b", "c", "c"], "t_p": 0.15, "t_j": 0.002, "divergence": "reference",
}  # fmt: skip


def vectors() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(5, 8)).astype(np.float16))


def written(folder: Path, meta: dict[str, object] | None = META) -> Path:
    save_file({"prototypes": vectors()}, folder / "p.safetensors")
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "p.safetensors"


def check_import(file: Path, output: Path) -> None:
    meta = json.loads((file.parent / "meta.json").read_text())
    manifest = import_prototypes(file, output, None, rows_per_shard=200)
    raw = next(iter(load_file(file).values()))
    book = Codebook.from_pretrained(output)
    assert torch.equal(book.prototypes, raw)
    assert (manifest.model.id, manifest.model.family, manifest.model.fingerprint) == (meta["model"], "llava", None)
    limits = manifest.thresholds
    assert (limits.top1_prob, limits.influence, limits.divergence) == (meta["t_p"], meta["t_j"], meta["divergence"])
    assert set(book.support.tolist()) == {len(set(meta["source_images"]))}
    assert set(book.cluster.tolist()) == {0}
    verify(output)
    index = ShardedIndex(output, manifest)
    queries = np.random.default_rng(1).normal(size=(64, raw.shape[1])).astype(np.float32)
    cosine = (
        torch.nn.functional.normalize(torch.from_numpy(queries), dim=1) @ torch.nn.functional.normalize(raw.float(), dim=1).T
    )
    assert index.search(queries, 1)[1][:, 0].tolist() == cosine.argmax(1).tolist()


def test_released_layout(tmp_path: Path) -> None:
    check_import(written(tmp_path), tmp_path / "book")


if (RELEASED / "prototypes.safetensors").is_file():

    def test_released_prototypes(tmp_path: Path) -> None:
        check_import(RELEASED / "prototypes.safetensors", tmp_path / "book")
        assert Codebook.from_pretrained(tmp_path / "book").prototypes.shape == (454, 4096)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"codebook": x}, lambda x: {"whatever": x, "n": 5}])
def test_pt_files(tmp_path: Path, wrap: object) -> None:
    torch.save(wrap(vectors()), tmp_path / "p.pt")  # type: ignore[operator]
    manifest = import_prototypes(tmp_path / "p.pt", tmp_path / "book", "org/model", family="llava")
    assert torch.equal(Codebook.from_pretrained(tmp_path / "book").prototypes, vectors())
    assert (manifest.model.family, manifest.thresholds.top1_prob, manifest.thresholds.divergence) == (
        "llava", None, "reference",
    )  # fmt: skip


def test_a_pt_file_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"prototypes": Evil()}, tmp_path / "p.pt")
    for name in ("raw.pt", "p.pt"):
        with pytest.raises(UserError, match="cannot read"):
            import_prototypes(tmp_path / name, tmp_path / "book", "m")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "book").exists()


def test_bad_files(tmp_path: Path) -> None:
    def fails(name: str, message: str, model: str | None = "m") -> None:
        with pytest.raises(UserError, match=message):
            import_prototypes(tmp_path / name, tmp_path / "book", model)
        assert not (tmp_path / "book").exists()

    fails("none.safetensors", "does not exist")
    with pytest.raises(UserError, match=r"model type 'llama' is not supported; supported: .*llava"):
        import_prototypes(written(tmp_path, None), tmp_path / "book", "m", family="llama")
    assert not (tmp_path / "book").exists()
    written(tmp_path, None)
    fails("p.safetensors", "--model", None)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "p.safetensors").read_bytes()[:50])
    fails("cut.safetensors", "cannot read")
    (tmp_path / "p.bin").write_bytes(b"x")
    fails("p.bin", ".safetensors or .pt")
    save_file({"a": vectors(), "b": vectors()}, tmp_path / "two.safetensors")
    fails("two.safetensors", "one 2-D tensor.*'a', 'b'")
    save_file({"a": vectors()[0]}, tmp_path / "flat.safetensors")
    fails("flat.safetensors", "none")
    save_file({"a": torch.full((2, 3), torch.nan)}, tmp_path / "nan.safetensors")
    fails("nan.safetensors", "NaN")
    for meta, message in (
        ("[", "cannot read"),
        ("[]", "JSON object"),
        ('{"source_images": ["a"]}', "one image for each of the 5"),
        ('{"divergence": "kl"}', "jsd or reference"),
        ('{"t_p": "x"}', "t_p must be a finite number"),
        ('{"t_p": NaN}', "t_p must be a finite number, not nan"),
        ('{"t_j": 1e400}', "t_j must be a finite number, not inf"),
        (f'{{"t_j": {"9" * 400}}}', r"t_j must be a finite number, not 9{37}\.\.\.$"),
        (f'{{"divergence": "{"k" * 400}"}}', r"not 'k{36}\.\.\.$"),
    ):
        (tmp_path / "meta.json").write_text(meta)
        fails("p.safetensors", message)
    (tmp_path / "meta.json").write_text('{"model": "a\\udc00b"}')
    fails("p.safetensors", "model id .* is not printable", None)
    for name in (".", "/", ".."):
        fails(name, "does not exist or is not a file")
