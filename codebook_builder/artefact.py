"""Writing codebooks: create, extend, merge, verify. manifest.json is always the last file written: the commit."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from torch import Tensor

from codebook_builder.card import card
from codebook_builder.commit import PARQUET, check_schema, delete_old
from codebook_builder.faiss_ops import write_shards
from codebook_prune.codebook import Codebook
from codebook_prune.index import ShardedIndex
from codebook_prune.stored import fetch
from codebook_schemas import BuildConfig, CodebookManifest, FileEntry, ModelInfo, Part, Quality, Thresholds, UserError
from codebook_schemas.config import content_hash
from codebook_schemas.errors import one_line
from codebook_schemas.files import replace_atomically, sync_folder
from codebook_schemas.manifest import MANIFEST
from codebook_schemas.object_store import ObjectPath, Place
from codebook_schemas.tables import provenance_schema

CARD = "README.md"
MAX_TABLE_BYTES, MAX_ROW_BYTES = 1 << 20, 8192
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


def parquet_bytes(table: pa.Table) -> bytes:
    """A parquet file with page checksums; equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **PARQUET)
    return buffer.getvalue()


def read_provenance(folder: Path, manifest: CodebookManifest) -> pa.Table | None:
    """Provenance of all prototypes [rows], verified; None if a part has none.

    Raises:
        UserError: a damaged file, another schema, or a wrong number of rows.
    """
    tables = []
    for part in manifest.parts:
        if part.provenance is None:
            return None
        manifest.verify(folder, [part.provenance])
        path = folder / part.provenance
        try:
            tables.append(_read_table(path, part.rows))
        except UserError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:  # names that are not UTF-8 among them
            raise UserError(f"codebook file {path} is damaged: {one_line(error)}") from None
    return pa.concat_tables(tables)


def _read_table(path: Path, rows: int) -> pa.Table:
    """Provenance of one part. Strings are read as dictionaries and measured first: a file of few bytes may hold long ones."""
    with pq.ParquetFile(path) as file:
        check_schema(file.schema_arrow, provenance_schema(), path)
        if file.metadata.num_rows != rows:
            raise UserError(f"codebook file {path} has {file.metadata.num_rows} rows, the manifest says {rows}")
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        if not 0 <= size <= MAX_TABLE_BYTES + rows * MAX_ROW_BYTES:
            raise UserError(f"codebook file {path} would take {size} bytes: too many for {rows} rows")
    with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=["shard", "key"]) as file:
        table = file.read()
    for name in ("shard", "key"):
        longest = pc.max(pc.binary_length(table[name].unify_dictionaries().chunk(0).dictionary)).as_py() or 0
        if longest > MAX_ROW_BYTES:
            raise UserError(f"codebook file {path} has a {name} of {longest} bytes")
    table = table.cast(provenance_schema())
    table.validate(full=True)
    return table


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
            model=origin.model,
            dimension=prototypes.vectors.shape[1],
            dtype=str(prototypes.vectors.dtype).removeprefix("torch."),
            thresholds=origin.thresholds,
            counts=origin.counts,
            parts=(part,),
            files=_files(folder, part),
            config=origin.config,
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


def extend(folder: Path, prototypes: Prototypes, origin: Origin, rows_per_shard: int) -> CodebookManifest:
    """Add a part to a codebook: existing files stay as they are, the new manifest, one version up, is the commit.

    New cluster numbers follow the existing ones. Until the commit, and after a crash, readers see the old codebook. The
    quality is that of the whole codebook on the new images.

    Raises:
        UserError: damaged codebook, another model, dimension or divergence scale, or the same input again.
    """
    old = Codebook.from_pretrained(folder)
    before = old.manifest
    before.verify(folder)
    _check_same_kind(before, origin.model, prototypes.vectors.shape[1], origin.thresholds, str(folder))
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


def _check_same_kind(book: CodebookManifest, model: ModelInfo, dimension: int, limits: Thresholds, name: str) -> None:
    pairs = {
        "model": (book.model.id, model.id),
        "model type": (book.model.family, model.family),
        "dimension": (book.dimension, dimension),
        "divergence scale": (book.thresholds.divergence, limits.divergence),
    }
    if book.model.fingerprint and model.fingerprint:
        pairs["connector fingerprint"] = (book.model.fingerprint, model.fingerprint)
    for what, (old, new) in pairs.items():
        if old != new:
            raise UserError(f"codebook {name} has {what} {old}, the other has {new}: they do not belong together")


def merge(folders: Sequence[Path], output: Path, rows_per_shard: int) -> CodebookManifest:
    """Join codebooks of one model into a new one, in the given order; clusters are renumbered so that none are mixed.

    Thresholds are kept where all agree. Quality is not measured: it needs the images.

    Raises:
        UserError: fewer than two, damaged or equal codebooks, or of different models, dimensions or divergence scales.
    """
    if len(folders) < 2:
        raise UserError("merge needs at least two codebooks")
    check_free(output)
    books = [Codebook.from_pretrained(folder) for folder in folders]
    first = books[0].manifest
    digests = [digest(folder) for folder in folders]
    if len(set(digests)) < len(digests):
        raise UserError(
            f"codebook {folders[next(i for i, d in enumerate(digests) if d in digests[:i])]} is there twice: same content"
        )
    for folder, book in zip(folders[1:], books[1:], strict=True):
        other = book.manifest
        _check_same_kind(first, other.model, other.dimension, other.thresholds, str(folders[0]))
        other.verify(folder)
    first.verify(folders[0])
    offsets = np.cumsum([0, *(int(book.cluster.max()) + 1 for book in books)])
    clusters = torch.cat([book.cluster + int(offset) for book, offset in zip(books, offsets, strict=False)])
    tables = [read_provenance(folder, book.manifest) for folder, book in zip(folders, books, strict=True)]
    provenance = None if any(t is None for t in tables) else pa.concat_tables(tables)
    if provenance is not None:
        place = provenance.schema.get_field_index("cluster")
        provenance = provenance.set_column(place, provenance_schema().field("cluster"), pa.array(clusters.numpy()))
    limits = [book.manifest.thresholds for book in books]
    shared = limits[0] if all(x == limits[0] for x in limits) else Thresholds(divergence=limits[0].divergence)
    joined = Prototypes(
        torch.cat([book.prototypes for book in books]), torch.cat([book.support for book in books]), clusters, provenance
    )
    counts = {"codebooks": len(books), "prototypes": len(clusters)}
    source = f"merge:{content_hash(digests)}"
    return create(output, joined, Origin(first.model, shared, counts, source=source), rows_per_shard)


def digest(folder: Place) -> str:
    """What a codebook is, in 64 hex digits: SHA-256 over the sorted (name, SHA-256) of all files of the manifest.

    Equal builds have equal digests: neither time, place nor the number of workers is in the files.
    """
    manifest = CodebookManifest.read(folder)
    text = "".join(f"{name}\0{entry.sha256}\n" for name, entry in sorted(manifest.files.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def collect_garbage(folder: Path, grace_seconds: float) -> list[Place]:
    """Delete what a killed `extend` left in a codebook folder, if older than the grace time: files named as ours that the
    manifest does not list, and temporary files. Returns what was deleted; raises UserError for a damaged manifest.
    """
    known = CodebookManifest.read(folder).files
    patterns = ("prototypes-*.safetensors", "prototypes-*.parquet", "index/shard-*.faiss", ".*.tmp", "index/.*.tmp")
    found = (path for pattern in patterns for path in folder.glob(pattern) if path.resolve().is_relative_to(folder.resolve()))
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
