"""Crash-safe files, local or in an object store: atomic replace, create-if-absent, hashes."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from codebook_schemas.errors import one_line
from codebook_schemas.object_store import ObjectPath, Place

CHUNK = 1 << 20
MAX_JSON_BYTES = 256 << 20


def sha256_of(path: Place) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as handle:
        return sha256_of_handle(handle)


def sha256_of_handle(handle: IO[bytes]) -> str:
    """Hex SHA-256 of what is left of an open file, read in chunks."""
    digest = hashlib.sha256()
    while chunk := handle.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Place, limit: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file that may hold anything.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a regular file, of more than `limit` bytes, unreadable, or not JSON; the reason in one line.
        OSError: an object store does not answer; that says nothing about the file.
    """
    try:
        if (size := _regular_size(path)) > limit:
            raise ValueError(f"it has {size} bytes, the limit is {limit}")
        return json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # also numbers of too many digits
        if isinstance(path, ObjectPath) and isinstance(error, OSError):
            raise
        raise ValueError(one_line(error)) from None


def _regular_size(path: Place) -> int:
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    return path.stat().st_size


def sync_folder(folder: Path) -> None:
    """fsync a folder so that a rename or link in it survives a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and fsync it (not atomic: use it for files nothing refers to yet)."""
    with open(path, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _through_temporary(path: Path, data: bytes, publish: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write_synced(temporary, data)
        publish(temporary)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_atomically(path: Place, data: bytes) -> None:
    """Write `path` so that a reader sees the old file or the new one, never half of one."""
    if isinstance(path, ObjectPath):
        path.write(data)
        return
    _through_temporary(path, data, lambda temporary: os.replace(temporary, path))


def create_exclusively(path: Place, data: bytes) -> bool:
    """Create `path` only if absent, complete from the first moment it exists; True for the one writer that won.

    In an object store writers of the same bytes all win: give each its own where it matters.
    """
    if isinstance(path, ObjectPath):
        return path.create(data)
    won = False

    def link(temporary: Path) -> None:
        nonlocal won
        try:
            os.link(temporary, path)
            won = True
        except FileExistsError:  # over NFS also for a link that was made, whose answer was lost and which was asked for again
            won = path.exists() and path.samefile(temporary)

    _through_temporary(path, data, link)
    return won
