"""WebDataset shards: a strict reader that never loses a sample silently, brace expansion, and writing.

Plain tar readers stop without an error at a truncated end or a damaged header. This one checks that an archive ends where it
should, reports duplicate and incomplete samples, and decodes images only, with Pillow only, under size limits.
"""

from __future__ import annotations

import errno
import io
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageOps

from codebook_prune.images import MAX_ASPECT, to_rgb, too_narrow
from codebook_schemas import UserError
from codebook_schemas.errors import one_line
from codebook_schemas.files import CHUNK, sha256_of_handle
from codebook_schemas.inputs import InputManifest, ShardEntry
from codebook_schemas.object_store import Place, place

FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
MAX_MEMBER_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MAX_SAMPLES = 1_000_000
MAX_MEMBERS = 8 * MAX_SAMPLES
MAX_KEY = 1024
MAX_FIELDS = 1000
DAMAGE = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError)
"""What tarfile raises on headers that are not what they should be."""
IMPOSSIBLE = (None, errno.EINVAL, errno.EOVERFLOW)
"""Numbers of the OSErrors among these; any other comes from the disk or the network, and may pass."""
FINAL = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""Numbers of the OSErrors of opening a file that another attempt does not cure."""


@dataclass
class _Sample:
    """Consecutive members of one key: what was wrong with them, and where the image's bytes are."""

    key: str
    names: dict[str, None] = field(default_factory=dict)
    images: list[tuple[str, tarfile.TarInfo]] = field(default_factory=list)
    problem: str | None = None

    def add(self, member: tarfile.TarInfo, extension: str) -> None:
        if len(self.names) == MAX_FIELDS:
            self.problem = f"has more than {MAX_FIELDS} members"
            return
        if not member.isfile() or member.issparse():
            self.problem = "is a link or another special file"
        elif extension in self.names:
            self.problem = f"has two members .{extension}"
        elif extension in FORMATS:
            self.images.append((FORMATS[extension], member))
        self.names[extension] = None

    def verdict(self, seen: set[str]) -> str | None:
        """Why the sample is unusable, printable and in one line, or None."""
        reason = self._problem(seen)
        return None if reason is None else one_line(reason)

    def _problem(self, seen: set[str]) -> str | None:
        if self.key in seen:
            return "duplicate key: an earlier sample of the shard has it"
        if len(self.key) > MAX_KEY or not self.key.isprintable():
            return f"key is longer than {MAX_KEY} characters or not printable UTF-8"
        if self.problem is not None:
            return self.problem
        if len(self.images) != 1:
            return f"has {len(self.images) or 'no'} image members (.{', .'.join(FORMATS)}) but .{', .'.join(self.names)}"
        size = self.images[0][1].size
        return f"image has {size} bytes, the limit is {MAX_MEMBER_BYTES}" if size > MAX_MEMBER_BYTES else None


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) as WebDataset splits a member name: at the first dot of its last component; None without a dot."""
    match = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", name, re.DOTALL)
    return (match[1], match[2].lower()) if match else None


def is_metadata(name: str) -> bool:
    """Whether a member is no part of any sample: WebDataset's `__name__` (a folder, or with an extension that is no image's),
    and `._name`, in which macOS keeps a file's attributes.
    """
    if match := re.fullmatch(r"__[^/]*__(?:/.*|\.([^/]*))?", name, re.DOTALL):
        return (match[1] or "").lower() not in FORMATS
    return name.rpartition("/")[2].startswith("._")


def _members(archive: tarfile.TarFile, path: Place) -> Iterator[tarfile.TarInfo]:
    """Every member; a UserError where the archive is damaged instead of an early, silent end."""
    last = -1
    while True:
        try:
            member = archive.next()
        except DAMAGE as error:
            _raise_if_it_may_pass(error, path)
            raise UserError(
                f"shard {path} is damaged near byte {archive.offset}: {one_line(error)}; fetch or write it again"
            ) from None
        if member is None:
            return
        if member.size < 0 or not last < member.offset < archive.offset:
            raise UserError(f"shard {path} is damaged at byte {member.offset}: its header gives an impossible size")
        last = member.offset
        archive.members = []  # type: ignore[attr-defined]  # forgotten, so that memory stays bounded
        yield member


def _raise_if_it_may_pass(error: BaseException, path: Place) -> None:
    """An error of the disk or the network says nothing about the shard: it is raised as it is, with the shard's name."""
    if isinstance(error, OSError) and error.errno not in IMPOSSIBLE:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _check_end(handle: IO[bytes], offset: int, path: Place) -> None:
    """The archive must end in at least two zero blocks with nothing after them."""
    handle.seek(0, os.SEEK_END)
    size = handle.tell()
    if size < offset + 2 * tarfile.BLOCKSIZE:
        raise UserError(f"shard {path} is truncated: no end-of-archive mark at byte {offset}; fetch or write it again")
    handle.seek(offset)
    while chunk := handle.read(CHUNK):
        if chunk.count(0) != len(chunk):
            raise UserError(f"shard {path} is damaged: no valid header at byte {offset}; fetch or write it again")


def _samples(handle: IO[bytes], path: Place) -> Iterator[_Sample]:
    """Groups of consecutive members with one key; the archive's end is checked after the last."""
    try:
        archive = tarfile.open(fileobj=handle, mode="r:")  # noqa: SIM115 - the handle is the caller's
    except DAMAGE as error:
        _raise_if_it_may_pass(error, path)
        raise UserError(f"{path} is not an uncompressed tar shard: {one_line(error)}") from None
    current: _Sample | None = None
    for number, member in enumerate(_members(archive, path)):
        if number >= MAX_MEMBERS:
            raise UserError(f"shard {path} has more than {MAX_MEMBERS} members: split it")
        if member.isdir() or is_metadata(member.name):
            continue
        key, extension = split_name(member.name) or (member.name, "")
        if current is None or key != current.key:
            if current is not None:
                yield current
            current = _Sample(key)
        current.add(member, extension)
    end = archive.offset
    if current is not None:
        yield current
    _check_end(handle, end, path)


def read_shard(path: Place) -> Iterator[tuple[str, Image.Image | str]]:
    """As `read_samples`, of a file or object, which is `opened` first."""
    with opened(path) as handle:
        yield from read_samples(handle, path)


def read_samples(handle: IO[bytes], path: Place) -> Iterator[tuple[str, Image.Image | str]]:
    """Every sample of an open shard in its order: (key, RGB image), or (key, reason) for one that cannot be used.

    Keys are data: never make a file name from one.

    Raises:
        UserError: not an uncompressed tar, truncated or damaged archive.
        OSError: the disk fails, which may pass.
    """
    seen: set[str] = set()
    for sample in _samples(handle, path):
        reason = sample.verdict(seen)
        seen.add(sample.key)
        if reason is not None:
            yield printable(sample.key), reason
            continue
        kind, member = sample.images[0]
        handle.seek(member.offset_data)
        yield sample.key, decode(handle.read(member.size), kind)


def printable(key: str) -> str:
    """A key made safe to show and store: undecodable or unprintable characters replaced, at most `MAX_KEY` of them."""
    return "".join(c if c.isprintable() else "\ufffd" for c in key[:MAX_KEY])


def decode(data: bytes, kind: str) -> Image.Image | str:
    """An upright RGB image from JPEG, PNG or WebP bytes, as `open_image` gives it, or the reason why not.

    The size is checked before pixels are decoded; of an animation, the first frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, about large images: the limit here is lower
            with Image.open(io.BytesIO(data), formats=[kind]) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    return f"image has {width} x {height} pixels, the limit is {MAX_PIXELS}"
                if too_narrow(image.size):
                    return f"image has {width} x {height} pixels: one side is more than {MAX_ASPECT} times the other"
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        return f"image has more pixels than the limit of {MAX_PIXELS}"
    except Exception as error:  # Pillow's decoders raise anything on damaged input
        return one_line(f"cannot decode {kind}: {type(error).__name__}: {error}")


def opened(path: Place) -> IO[bytes]:
    """A shard, open for reading; an object is copied to an unnamed temporary file first.

    Raises:
        UserError: it is missing, or this machine may not read it.
        OSError: a disk or an object store does not answer, which may pass.
    """
    try:
        return path.open("rb")
    except OSError as error:
        if error.errno not in FINAL:
            raise
        raise UserError(f"cannot read shard {path} on {os.uname().nodename}: {error.strerror or error}") from None


def expand(patterns: Sequence[str]) -> list[Place]:
    """Shards of a list of paths, s3:// addresses and brace patterns (`images-{000..015}.tar`), absolute, in order.

    Raises:
        UserError: empty list, another address or a command, a missing shard, or one that occurs twice.
    """
    os.environ["WDS_SECURE"] = "1"
    from webdataset.shardlists import expand_urls

    paths: list[Place] = []
    for pattern in patterns:
        if "://" in pattern:
            place(pattern)
        elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", pattern):
            raise UserError(f"shard {pattern} is neither a local path nor an s3:// address")
        try:
            names = [pattern] if Path(pattern).is_file() else expand_urls(pattern)
        except (ValueError, AssertionError) as error:
            raise UserError(f"shard pattern {pattern} cannot be expanded: {error}") from None
        paths += [place(str(name)) for name in names]
    if not paths:
        raise UserError("no shards given: name at least one tar file or brace pattern")
    if repeated := sorted(str(p) for p, count in Counter(paths).items() if count > 1):
        raise UserError(f"shard {repeated[0]} is listed twice")
    if missing := [p for p in paths if not p.is_file()]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"shard {missing[0]} does not exist or is not a file{more}")
    return paths


def scan_shard(path: Place, name: str) -> ShardEntry:
    """Size, SHA-256 and number of samples of one shard.

    Raises:
        UserError: as `read_shard`, or the shard is empty or has too many samples.
    """
    with opened(path) as handle:
        samples = sum(1 for _ in _samples(handle, path))
        size = handle.seek(0, os.SEEK_END)
        handle.seek(0)
        digest = sha256_of_handle(handle)
    if not 1 <= samples <= MAX_SAMPLES:
        raise UserError(f"shard {path} has {samples} samples: between 1 and {MAX_SAMPLES} are allowed")
    return ShardEntry(name=name, path=str(path), bytes=size, sha256=digest, samples=samples)


def scan(patterns: Sequence[str]) -> InputManifest:
    """The input manifest of a list of shards: what a build will verify them against.

    Raises:
        UserError: as `expand` and `scan_shard`, or two shards with the same content.
    """
    entries: list[ShardEntry] = []
    known: dict[str, str] = {}
    for number, path in enumerate(expand(patterns)):
        base = re.sub(r"[^A-Za-z0-9_.-]", "_", path.name)[-80:]
        entry = scan_shard(path, f"{number:05d}-{base}")
        if entry.sha256 in known:
            raise UserError(f"shards {known[entry.sha256]} and {path} are identical: an image must not count twice")
        known[entry.sha256] = str(path)
        entries.append(entry)
    return InputManifest(shards=tuple(entries))


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, Any]]]) -> int:
    """Write a shard with webdataset; the same samples give the same bytes. Returns the number of samples.

    Args:
        path: the tar file; replaced if it exists.
        samples: (key, {extension: bytes, str, or a PIL image for png / jpg}) in order.
    """
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    number = 0
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as stream, webdataset.TarWriter(stream, mtime=0, user="", group="") as writer:
            for key, fields in samples:
                writer.write({"__key__": key, **fields})
                number += 1
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return number
