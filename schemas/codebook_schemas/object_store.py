"""Objects of an S3-compatible store, through fsspec, with the part of `pathlib.Path` that builds use.

An object appears whole and is never renamed. What `os.link` is to local files, a conditional put (`If-None-Match: *`) is
here: of any number of writers one creates the object. Credentials and endpoint come from where every S3 client looks for them
(the environment, ~/.aws, the machine's role), never from an address. Needs the extra `s3`, imported when an object is touched.
"""

from __future__ import annotations

import errno
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal, NamedTuple

from codebook_schemas.errors import UserError, one_line

ATTEMPTS, SECONDS_BETWEEN = 3, 0.2
BLOCK = 16 << 20
_ADDRESS = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]+(/(?!\.{1,2}(/|$))[^/?#*\[\]@:\\\x00-\x1f\x7f]+)+")


class Stat(NamedTuple):
    """Size in bytes and time of the last change in seconds, named as `os.stat` names them."""

    st_size: int
    st_mtime: float


@dataclass(frozen=True)
class ObjectPath:
    """The object, or the prefix, at `s3://bucket/name/...`; methods named as in `Path` do what those do.

    A store that cannot be reached or refuses is an OSError that names the object and may pass; FileNotFoundError: it has none.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its last extension."""
        return Path(self.name).stem

    @property
    def parent(self) -> ObjectPath:
        """The prefix it lies under."""
        return ObjectPath(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        """Its neighbour of that name."""
        return self.parent / name

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: prefixes need not be made."""

    def stat(self) -> Stat:
        """Size and time of the last change."""
        with _reported(self) as store:
            found = store.info(self.url)
        if found["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "there is no such object", self.url)
        return Stat(found["size"], found["LastModified"].timestamp())

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    exists = is_file

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """What lies directly under this prefix and has a name of that pattern, in the order of names."""
        try:
            with _reported(self) as store:
                found = store.ls(self.url, detail=False)
        except FileNotFoundError:
            return
        names = {name.removesuffix("/").rpartition("/")[2] for name in found if f"s3://{name}" != self.url}
        yield from (self / name for name in sorted(names) if fnmatchcase(name, pattern))

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Delete it; a missing one is no error here, whatever `missing_ok` says."""
        with _reported(self) as store:
            store.rm_file(self.url)

    def read_bytes(self) -> bytes:
        """All of it."""
        with _reported(self) as store:
            data: bytes = store.cat_file(self.url)
        return data

    def open(self, mode: Literal["rb"] = "rb") -> IO[bytes]:
        """A copy on this machine's disk, without a name: it disappears when it is closed, or with the process."""
        copy = TemporaryFile(mode="w+b")  # noqa: SIM115 - the caller's
        try:
            with _reported(self) as store, store.open(self.url, mode, block_size=BLOCK) as source:
                shutil.copyfileobj(source, copy, BLOCK)
            copy.seek(0)
        except BaseException:
            copy.close()
            raise
        return copy

    def write(self, data: bytes) -> None:
        """Put it there, in place of what may be there."""
        with _reported(self) as store:
            store.pipe_file(self.url, data)

    def create(self, data: bytes) -> bool:
        """Put it there if nothing is; True if the object now holds `data`.

        After any failure the object itself is asked: the answer to a put that succeeded may be lost, and a client that repeats
        it is then refused by its own object; stores also refuse (409) while another put of the same name is under way.
        """
        attempt = 0
        while True:
            try:
                with _reported(self) as store:
                    store.pipe_file(self.url, data, mode="create")
            except OSError:
                if self.exists():
                    return self.read_bytes() == data
                attempt += 1
                if attempt == ATTEMPTS:
                    raise
                time.sleep(SECONDS_BETWEEN)
            else:
                return True

    def upload(self, handle: IO[bytes], mode: Literal["wb", "xb"]) -> None:
        """Put a file's content there, in pieces; "xb": only if nothing is there."""
        with _reported(self) as store, store.open(self.url, mode, block_size=BLOCK) as target:
            shutil.copyfileobj(handle, target, BLOCK)

    def require_exclusive(self) -> None:
        """Make sure with a small object of this name that the store honours conditional puts: some ignore the condition.

        Raises:
            UserError: it does not.
        """
        self.create(b"first")
        if self.create(b"second"):
            raise UserError(f"the store of {self} ignores If-None-Match: two builds could mix there; use another store")


Place = Path | ObjectPath
"""A local path, or an object of a store."""


def place(text: str) -> Place:
    """What a path or address means: an absolute local path, or an object.

    Raises:
        UserError: an address that is not s3://bucket/name (credentials or options in it are not shown again), or the extra `s3`
            is not installed.
    """
    if "://" not in text:
        return Path(text).expanduser().absolute()
    if not _ADDRESS.fullmatch(text.rstrip("/")):
        scheme, _, rest = text.partition("://")
        shown = f"{scheme}://..." if re.search("[@:?#]", rest) else text
        raise UserError(
            f"{one_line(shown)} is neither a local path nor of the form s3://bucket/name (credentials and endpoint are taken "
            "from the environment)"
        )
    if find_spec("s3fs") is None:
        raise UserError(f"{text} needs the extra s3: pip install 'codebook-prune[s3]'")
    return ObjectPath(text.rstrip("/"))


@contextmanager
def _reported(path: ObjectPath) -> Iterator[Any]:
    """The file system; what goes wrong with it is an OSError in one line: the libraries below have many kinds of their own."""
    import fsspec

    try:
        yield fsspec.filesystem("s3", use_listings_cache=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, one_line(error), path.url) from None
    except Exception as error:
        raise OSError(errno.EIO, one_line(error), path.url) from None
