"""Writing codebooks: create, extend, verify. manifest.json is always the last file written: the commit."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save
from torch import Tensor

from codebook_builder.card import card
from codebook_builder.commit import delete_old
from codebook_builder.faiss_ops import write_shards
from codebook_builder.provenance import parquet_bytes, read_provenance
from codebook_prune.codebook import Codebook
from codebook_prune.index import ShardedIndex
from codebook_prune.stored import fetch
from codebook_schemas import BuildConfig, CodebookManifest, FileEntry, ModelInfo, Part, Quality, Thresholds, UserError
from codebook_schemas.files import replace_atomically, sync_folder
from codebook_schemas.manifest import MANIFEST, base_name, model_name
from codebook_schemas.object_store import ObjectPath, Place

CARD = "README.md"
LIBRARIES = ("codebook-prune", "torch", "transformers", "numpy", "faiss-cpu", "faiss-gpu", "pyarrow", "safetensors", "pillow")
Measure = Callable[[Codebook, ShardedIndex], Quality]


@dataclass(frozen=True)
class Prototypes:
    """What becomes one part: vectors [n, d], support [n] and cluster [n] int32, and where they came from (None: unknown)."""

    vectors: Tensor
    support: Tensor
    cluster: Tensor
    provenance: pa.Table | None


@dataclass(frozen=True)
class Origin:
    """What the manifest says about a codebook's making; `source` names the input, `measure` gives its quality."""

    model: ModelInfo
    thresholds: Thresholds
    counts: dict[str, int]
    config: BuildConfig | None = None
    source: str | None = None
    measure: Measure | None = None


def libraries() -> dict[str, str]:
    """Versions of the installed libraries that a codebook's content may depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes `output` when the block ends well, and disappears otherwise.

    Raises:
        UserError: `output` exists and is not an empty folder.
    """
    check_free(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f".{output.name}.{uuid.uuid4().hex}.tmp")
    folder.mkdir()
    try:
        yield folder
        sync_folder(folder)
        os.rename(folder, output)
        sync_folder(output.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_free(output: Path) -> None:
    """Refuse to write over anything: `output` must not exist or be an empty folder."""
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UserError(f"{output} already exists: choose another output, or remove it")


def write_part(folder: Path, prototypes: Prototypes, before: CodebookManifest | None, rows_per_shard: int) -> Part:
    """Write the files of one more part after those of `before`; no existing file of `before` is touched.

    Returns:
        The part as the manifest lists it. Index shards are numbered on, ids start at the number of rows before.
    """
    parts = before.parts if before else ()
    suffix = f"-{len(parts):05d}" if parts else ""
    names = f"prototypes{suffix}.safetensors", f"prototypes{suffix}.parquet"
    tensors = {"prototypes": prototypes.vectors, "support": prototypes.support, "cluster": prototypes.cluster}
    replace_atomically(folder / names[0], save({k: v.contiguous() for k, v in tensors.items()}, {"format": "pt"}))
    if prototypes.provenance is not None:
        replace_atomically(folder / names[1], parquet_bytes(prototypes.provenance))
    index: list[str] = []
    if all(part.index for part in parts):
        vectors = prototypes.vectors.float().numpy()
        first_id, first_shard = (before.rows if before else 0), sum(len(part.index) for part in parts)
        index = write_shards(folder, vectors, rows_per_shard, first_id, first_shard)
    provenance = names[1] if prototypes.provenance is not None else None
    return Part(prototypes=names[0], rows=len(prototypes.vectors), index=tuple(index), provenance=provenance)


def published(config: BuildConfig) -> BuildConfig:
    """What a codebook says of its configuration: no folder of the machine that built it. `config_hash` is of the whole one."""
    names = {"model": model_name(config.model), "output": base_name(config.output)}
    return config.model_copy(update={**names, "shards": tuple(map(base_name, config.shards))})


def _files(folder: Path, part: Part) -> dict[str, FileEntry]:
    names = [part.prototypes, *part.index, *([part.provenance] if part.provenance else [])]
    return {name: FileEntry.of(folder / name) for name in names}


def create(output: Path, prototypes: Prototypes, origin: Origin, rows_per_shard: int) -> CodebookManifest:
    """Write a new codebook; `output` appears complete or not at all.

    Raises:
        UserError: `output` exists already.
    """
    with staged(output) as folder:
        part = write_part(folder, prototypes, None, rows_per_shard)
        manifest = CodebookManifest(
            model=origin.model.model_copy(update={"id": model_name(origin.model.id)}),
            dimension=prototypes.vectors.shape[1],
            dtype=str(prototypes.vectors.dtype).removeprefix("torch."),
            thresholds=origin.thresholds,
            counts=origin.counts,
            parts=(part,),
            files=_files(folder, part),
            config=origin.config and published(origin.config),
            config_hash=origin.config.content_hash if origin.config else None,
            source=origin.source,
            libraries=libraries(),
        )
        if origin.measure is not None:
            book = Codebook(prototypes.vectors, prototypes.support, prototypes.cluster, manifest, folder)
            quality = origin.measure(book, ShardedIndex(folder, manifest))
            manifest = manifest.model_copy(update={"quality": quality})
        replace_atomically(folder / CARD, card(manifest).encode())
        files = manifest.files | {CARD: FileEntry.of(folder / CARD)}
        manifest = manifest.model_copy(update={"files": files})
        manifest.commit(folder)
    return manifest


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only one who changes a codebook. The lock is the system's, on the manifest, and ends with its process.

    Raises:
        UserError: no codebook there, a damaged one, or one that another process is changing.
    """
    path = folder / MANIFEST
    CodebookManifest.read(folder)
    while True:
        with open(path, "r+b") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"codebook {folder} is being changed by another process: nothing was done here, run the same command again "
                    "when that has ended"
                ) from None
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):  # else it was replaced before it was locked
                yield
                return


def extend(folder: Path, prototypes: Prototypes, origin: Origin, rows_per_shard: int) -> CodebookManifest:
    """Add a part to a codebook: existing files stay as they are, the new manifest, one version up, is the commit.

    New cluster numbers follow the existing ones. Until the commit, and after a crash, readers see the old codebook. The
    quality is that of the whole codebook on the new images.

    Raises:
        UserError: damaged codebook, another model, dimension or divergence scale, the same input again, or another process is
            changing the codebook.
    """
    with alone(folder):
        return _extend(folder, prototypes, origin, rows_per_shard)


def _extend(folder: Path, prototypes: Prototypes, origin: Origin, rows_per_shard: int) -> CodebookManifest:
    old = Codebook.from_pretrained(folder)
    before = old.manifest
    before.verify(folder)
    check_same_kind(before, origin.model, prototypes.vectors.shape[1], origin.thresholds, str(folder))
    sources = check_new_source(folder, before, origin.source)
    shifted = prototypes.cluster + (int(old.cluster.max()) + 1)
    vectors = prototypes.vectors.to(old.prototypes.dtype)
    new = Prototypes(vectors, prototypes.support, shifted, prototypes.provenance)
    part = write_part(folder, new, before, rows_per_shard)
    sync_folder(folder)
    counts = {k: before.counts.get(k, 0) + v for k, v in origin.counts.items()}
    manifest = before.model_copy(
        update={
            "version": before.version + 1,
            "parts": (*before.parts, part),
            "files": before.files | _files(folder, part),
            "counts": before.counts | counts,
            "source": " + ".join([*sources, *([origin.source] if origin.source else [])]) or None,
            "libraries": libraries(),
        }
    )
    if origin.measure is not None and part.index:
        rows, support = torch.cat([old.prototypes, vectors]), torch.cat([old.support, new.support])
        book = Codebook(rows, support, torch.cat([old.cluster, shifted]), manifest, folder)
        quality = origin.measure(book, ShardedIndex(folder, manifest))
        manifest = manifest.model_copy(update={"quality": quality})
    manifest.commit(folder)
    return manifest


def check_new_source(folder: Path, manifest: CodebookManifest, source: str | None) -> list[str]:
    """Refuse input a codebook already has (raises UserError); returns what it has."""
    sources = [s for s in (manifest.source or "").split(" + ") if s]
    if source in sources:
        raise UserError(f"codebook {folder} was already built from or extended with these images ({source})")
    return sources


def check_same_kind(book: CodebookManifest, model: ModelInfo, dimension: int, limits: Thresholds, name: str) -> None:
    """Refuse prototypes of another model, dimension or divergence scale than those of codebook `name` (raises UserError)."""
    pairs = {
        "model": (model_name(book.model.id), model_name(model.id)),
        "model type": (book.model.family, model.family),
        "dimension": (book.dimension, dimension),
        "divergence scale": (book.thresholds.divergence, limits.divergence),
    }
    if book.model.fingerprint and model.fingerprint:
        pairs["connector fingerprint"] = (book.model.fingerprint, model.fingerprint)
    for what, (old, new) in pairs.items():
        if old != new:
            raise UserError(f"codebook {name} has {what} {old}, the other has {new}: they do not belong together")


def digest(folder: Place) -> str:
    """What a codebook is, in 64 hex digits: SHA-256 over the sorted (name, SHA-256) of all files of the manifest.

    Equal builds have equal digests: neither time, place nor the number of workers is in the files.
    """
    manifest = CodebookManifest.read(folder)
    text = "".join(f"{name}\0{entry.sha256}\n" for name, entry in sorted(manifest.files.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def collect_garbage(folder: Path, grace_seconds: float) -> list[Place]:
    """Delete what a killed `extend` left in a codebook folder, if older than the grace time: files named as ours that the
    manifest does not list, and temporary files. Returns what was deleted.

    Raises:
        UserError: a damaged manifest, or another process is changing the codebook.
    """
    patterns = ("prototypes-*.safetensors", "prototypes-*.parquet", "index/shard-*.faiss", ".*.tmp", "index/.*.tmp")
    with alone(folder):
        known = CodebookManifest.read(folder).files
        found = (p for pattern in patterns for p in folder.glob(pattern) if p.resolve().is_relative_to(folder.resolve()))
        return delete_old([path for path in found if path.relative_to(folder).as_posix() not in known], grace_seconds)


def verify(folder: Place) -> CodebookManifest:
    """Check every file's size and hash, parse everything, and let the index find the prototypes.

    A codebook in an object store is copied to this machine first.

    Raises:
        UserError: the first thing that is wrong.
    """
    if isinstance(folder, ObjectPath):
        with TemporaryDirectory() as name:
            copy = Path(name) / folder.name
            fetch(folder, copy)
            try:
                return verify(copy)
            except UserError as error:
                raise UserError(str(error).replace(str(copy), str(folder))) from None
    manifest = CodebookManifest.read(folder)
    manifest.verify(folder)
    book = Codebook.from_pretrained(folder)
    read_provenance(folder, manifest)
    if any(part.index for part in manifest.parts):
        index = ShardedIndex(folder, manifest)
        vectors = book.prototypes.float().numpy()
        chosen = np.linspace(0, len(vectors) - 1, min(len(vectors), 1024)).round().astype(np.int64)
        scores, ids = index.search(vectors[chosen], 1)
        cosine = (book.cosine(book.prototypes[chosen].float()).numpy())[np.arange(len(chosen)), ids[:, 0]]
        if not (np.allclose(scores, 1, atol=1e-3) and np.allclose(cosine, 1, atol=1e-3)):
            raise UserError(f"codebook {folder} is damaged: its index does not hold its prototypes")
    return manifest


def manifest_exists(folder: Place) -> bool:
    """Whether there is a committed codebook."""
    return (folder / MANIFEST).is_file()
