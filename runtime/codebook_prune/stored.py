"""Codebooks in an object store: copied to this machine before anything opens them."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from codebook_schemas import CodebookManifest, UserError
from codebook_schemas.files import sha256_of
from codebook_schemas.manifest import MANIFEST
from codebook_schemas.object_store import ObjectPath


def fetch(source: ObjectPath, folder: Path) -> None:
    """Copy the files that a stored codebook's manifest lists into `folder`; nothing but the manifest is verified.

    Raises:
        UserError: no codebook there, or a damaged manifest.
        OSError: the store does not answer, or lacks a file.
    """
    names = [*CodebookManifest.read(source).files, MANIFEST]
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open() as stored, open(path, "wb") as copy:
            shutil.copyfileobj(stored, copy)


def cached(source: ObjectPath) -> Path:
    """A verified copy of a stored codebook in ~/.cache/codebook-prune (XDG_CACHE_HOME), made once for each of its versions.

    Raises:
        UserError: no codebook there, a damaged one or copy (which is not kept), or the store does not answer.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "codebook-prune"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        folder = cache / hashlib.sha256((source / MANIFEST).read_bytes()).hexdigest()
        if not folder.is_dir():
            with TemporaryDirectory(dir=cache, prefix=".") as name:
                _keep(source, Path(name) / source.name, folder)
    except OSError as error:
        raise UserError(f"cannot fetch codebook {source}: {error.strerror}") from None
    return folder


def _keep(source: ObjectPath, copy: Path, folder: Path) -> None:
    """Copy, verify, and only then move to `folder`; if someone else was faster, theirs is the same."""
    fetch(source, copy)
    try:
        CodebookManifest.read(copy).verify(copy)
    except UserError as error:
        raise UserError(str(error).replace(str(copy), str(source))) from None
    if sha256_of(copy / MANIFEST) != folder.name:
        raise UserError(f"codebook {source} was replaced while it was copied: load it again")
    try:
        copy.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
