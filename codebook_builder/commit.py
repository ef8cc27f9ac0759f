"""The commit protocol: immutable part files, and one marker a shard, created only if absent, that makes its part count.

A part that no marker names does not exist for anyone. Whoever creates the marker has won; a loser deletes its part. So a row is
committed exactly once whatever is killed, retried or run twice.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from codebook_schemas import UserError
from codebook_schemas.config import Strict, describe
from codebook_schemas.files import create_exclusively, read_json, sha256_of, sync_folder
from codebook_schemas.inputs import ShardEntry
from codebook_schemas.object_store import Place
from codebook_schemas.tables import probe_schema

DONE = "_done"
GRACE_SECONDS = 24 * 3600.0
PARQUET = {"write_page_checksum": True, "compression": "zstd", "use_dictionary": ["shard", "key"]}


class Skipped(Strict):
    """A sample that could not be used."""

    key: str
    reason: str


class Encoder(Strict):
    """What produced the embeddings of a part: model type, connector fingerprint and dimension."""

    family: str
    fingerprint: str
    dimension: int = Field(ge=1)


class Marker(Strict):
    """The committed result of one shard: names its part and everything the part depends on."""

    file: str = Field(pattern=r"^part-[A-Za-z0-9_.-]+\.parquet$")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(ge=0)
    images: int = Field(ge=0)
    skipped: tuple[Skipped, ...] = ()
    input_sha256: str
    probe_hash: str
    encoder: Encoder


class PartWriter:
    """Writes one part, a row group for every `write`; the file has a unique name and is fsynced when the block ends well.

    After an exception inside the block the file is deleted; in an object store it was not there yet.
    """

    def __init__(self, folder: Place, shard: str, attempt: int, dimension: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"part-{shard}-{attempt}-{uuid.uuid4().hex}.parquet"
        self.rows = 0
        self._schema = probe_schema(dimension)

    def __enter__(self) -> PartWriter:
        """Create the file."""
        self._handle = open(self.path, "wb") if isinstance(self.path, Path) else TemporaryFile(mode="w+b")
        self._writer = pq.ParquetWriter(self._handle, self._schema, **PARQUET)
        return self

    def write(self, table: pa.Table) -> None:
        """Append the rows of some whole images, exactly of `probe_schema`."""
        if not table.schema.equals(self._schema):
            raise ValueError(f"rows have another schema: {table.schema}")
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self.rows += table.num_rows

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finish and fsync the file, or delete it: also when it cannot be finished, as on a full disk."""
        finished = False
        try:
            self._writer.close()
            self._handle.flush()
            if isinstance(self.path, Path):
                os.fsync(self._handle.fileno())
                self._handle.close()
                sync_folder(self.path.parent)
            elif kind is None:
                self._handle.seek(0)
                self.path.upload(self._handle, "xb")
                self._handle.close()
            finished = kind is None
        except OSError:
            if kind is None:
                raise
        finally:
            if not finished:
                with suppress(OSError):
                    self._handle.close()
                if isinstance(self.path, Path):
                    self.path.unlink(missing_ok=True)


def marker_path(folder: Place, shard: str) -> Place:
    """Where the marker of a shard is."""
    return folder / DONE / f"{shard}.json"


def commit(folder: Place, shard: str, marker: Marker) -> bool:
    """Create the shard's marker if it is absent: the commit point. The loser's part is deleted; True for the winner."""
    path = marker_path(folder, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    won = create_exclusively(path, (marker.model_dump_json(indent=1) + "\n").encode())
    if not won:
        (folder / marker.file).unlink(missing_ok=True)
    return won


def read_marker(folder: Place, shard: str) -> Marker | None:
    """The marker of a shard, None if the shard is not committed; raises UserError for a damaged one."""
    path = marker_path(folder, shard)
    try:
        return Marker.model_validate(read_json(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        reason = describe(error) if isinstance(error, ValidationError) else error
        raise UserError(f"marker {path} is damaged ({reason}): delete it to probe the shard again") from None


def committed(folder: Place, shards: list[ShardEntry], probe_hash: str) -> dict[str, Marker]:
    """Markers of those shards that are committed, by shard name, in the order of `shards`.

    Raises:
        UserError: a marker is damaged, or belongs to another configuration or other input; names both hashes.
    """
    found: dict[str, Marker] = {}
    for shard in shards:
        marker = read_marker(folder, shard.name)
        if marker is None:
            continue
        for what, old, new in (
            ("configuration", marker.probe_hash, probe_hash),
            ("content", marker.input_sha256[:16], shard.sha256[:16]),
        ):
            if old != new:
                raise UserError(
                    f"{marker_path(folder, shard.name)} was committed with {what} {old}, this build has {new}: "
                    "choose another output, or delete its .run folder"
                )
        found[shard.name] = marker
    return found


def verify_part(folder: Place, marker: Marker) -> None:
    """Check a part's size and SHA-256; raises UserError naming the file."""
    path = folder / marker.file
    if not path.is_file():
        raise UserError(f"committed part {path} is missing: delete its marker to probe the shard again")
    if path.stat().st_size != marker.bytes or sha256_of(path) != marker.sha256:
        raise UserError(f"committed part {path} is damaged: delete it and its marker to probe the shard again")


def read_part(folder: Place, marker: Marker) -> Iterator[pa.Table]:
    """The row groups of a part, of whole images each, with page checksums verified and the schema checked exactly.

    Raises:
        UserError: unreadable or damaged file, another schema, or a wrong number of rows. Call `verify_part` before.
    """
    path = folder / marker.file
    rows = 0
    with path.open("rb") as handle:
        try:
            with pq.ParquetFile(handle, page_checksum_verification=True) as file:
                check_schema(file.schema_arrow, probe_schema(marker.encoder.dimension), path)
                for number in range(file.num_row_groups):
                    table = file.read_row_group(number)
                    rows += table.num_rows
                    yield table
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"part {path} is damaged: {str(error).splitlines()[0]}") from None
    if rows != marker.rows:
        raise UserError(f"part {path} has {rows} rows, its marker says {marker.rows}")


def check_schema(found: pa.Schema, wanted: pa.Schema, path: Place) -> None:
    """Refuse a table that is not exactly of our schema; extension types, which may run code, are refused by name."""
    for column in found:
        metadata = column.metadata or {}
        if isinstance(column.type, pa.BaseExtensionType) or b"ARROW:extension:name" in metadata:
            raise UserError(f"{path} holds the extension type column '{column.name}': refused")
    if not found.equals(wanted):
        raise UserError(f"{path} is not a table of this release: expected columns {wanted.names}, found {found.names}")


def collect_garbage(folder: Place, grace_seconds: float = GRACE_SECONDS) -> list[Place]:
    """Delete parts that no marker names and temporary files, if older than the grace time; returns what was deleted.

    Younger ones may belong to a worker that is still writing.
    """
    used = set()
    for path in (folder / DONE).glob("*.json"):
        marker = read_marker(folder, path.stem)
        if marker is not None:
            used.add(marker.file)
    candidates = [p for p in folder.glob("part-*.parquet") if p.name not in used]
    return delete_old([*candidates, *folder.glob(".*.tmp"), *(folder / DONE).glob(".*.tmp")], grace_seconds)


def delete_old(candidates: Iterable[Place], grace_seconds: float) -> list[Place]:
    """Delete those files and folders that were last changed longer ago than the grace time; returns them."""
    limit = time.time() - grace_seconds
    deleted = [p for p in sorted(candidates, key=str) if p.exists() and p.stat().st_mtime <= limit]
    for path in deleted:
        if isinstance(path, Path) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return deleted
