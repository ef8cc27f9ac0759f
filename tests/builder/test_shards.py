"""The strict shard reader: what is readable is read, the rest is an error or is reported, nothing is lost silently."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import time
import zlib
from pathlib import Path

import pytest
from building import png, scene_shards, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from codebook_builder import shards
from codebook_builder.commit import Skipped
from codebook_builder.shards import expand, opened, read_samples, read_shard, scan, split_name, write_shard
from codebook_schemas import UserError
from codebook_schemas.files import sha256_of


def reasons(path: Path) -> dict[str, str]:
    return {key: value for key, value in read_shard(path) if isinstance(value, str)}


def keys(path: Path) -> list[str]:
    return [key for key, value in read_shard(path) if not isinstance(value, str)]


def test_reads_what_webdataset_wrote(tmp_path: Path) -> None:
    image = Image.new("RGB", (5, 4), (10, 20, 30))
    n = write_shard(tmp_path / "a.tar", [("x/one", {"png": image, "txt": "hello"}), ("two", {"png": image})])
    assert n == 2
    read = list(read_shard(tmp_path / "a.tar"))
    assert [key for key, _ in read] == ["x/one", "two"]
    for _, value in read:
        assert isinstance(value, Image.Image)
        assert (value.size, value.mode, value.getpixel((0, 0))) == ((5, 4), "RGB", (10, 20, 30))


def test_written_shards_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        scene_shards(tmp_path / name, shards=1, images=2)
    assert sha256_of(tmp_path / "a/s-000.tar") == sha256_of(tmp_path / "b/s-000.tar")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.jpg", ("a", "jpg")), ("d.e/a.seg.PNG", ("d.e/a", "seg.png")), ("noext", None), (".hidden", None), ("d/.x", None)],
)
def test_names_split_as_webdataset_splits_them(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected


def test_bad_samples_are_reported_with_their_key(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("good.png", png()), ("good.json", b"{}"),
            ("broken.png", png()[:60]),
            ("text.png", b"not an image"),
            ("noimage.txt", b"x"),
            ("two.png", png()), ("two.jpg", png()),
            ("good.png", png(1)),
            ("code.pkl", b"cos\nsystem\n(S'false'\ntR."),
            ("last.png", png(2)),
        ],
    )  # fmt: skip
    assert keys(path) == ["good", "last"]
    found = reasons(path)
    assert set(found) == {"broken", "text", "noimage", "two", "good", "code"}
    assert "duplicate" in found["good"]
    assert "2 image members" in found["two"]
    assert "no image members" in found["noimage"]
    assert "cannot decode" in found["broken"]
    assert len(keys(path)) + len(list(reasons(path))) == scan([str(path)]).shards[0].samples


def test_every_truncation_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(4)]).read_bytes()
    end = len(whole.rstrip(b"\0"))
    cut = tmp_path / "cut.tar"
    for size in [*range(1, end, 97), *range(512, end + 1024, 512)]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.tar"):
            list(read_shard(cut))
        with pytest.raises(UserError, match=r"cut\.tar"):
            scan([str(cut)])


@settings(max_examples=60, deadline=None)
@given(member=st.integers(0, 3), offset=st.integers(0, 511), flip=st.integers(1, 255))
def test_a_damaged_header_is_never_silent(
    tmp_path_factory: pytest.TempPathFactory, member: int, offset: int, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = write_tar(folder / "a.tar", [(f"{i}.png", png(i)) for i in range(4)])
    with tarfile.open(path) as archive:
        start = archive.getmembers()[member].offset
    data = bytearray(path.read_bytes())
    data[start + offset] ^= flip
    path.write_bytes(data)
    try:
        seen = [key for key, _ in read_shard(path)]
    except UserError:
        return
    assert len(seen) == 4


def test_what_is_not_a_shard(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("hello " * 1000)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "gz.tar").write_bytes(b"\x1f\x8b" + zlib.compress(b"x" * 5000))
    write_tar(tmp_path / "nothing.tar", [])
    for name in ("text", "empty", "gz", "nothing"):
        with pytest.raises(UserError, match=f"{name}.tar"):
            scan([str(tmp_path / f"{name}.tar")])


def test_lists_of_shards(tmp_path: Path) -> None:
    pattern = scene_shards(tmp_path, shards=3, images=1)
    assert [p.name for p in expand([pattern])] == ["s-000.tar", "s-001.tar", "s-002.tar"]
    first = str(tmp_path / "s-000.tar")
    for patterns, message in (
        ([], "no shards"),
        ([str(tmp_path / "s-{000..004}.tar")], "does not exist.*1 more"),
        ([first, first], "listed twice"),
        (["pipe:cat x"], "neither a local path nor"),
        (["https://example.org/a.tar"], "neither a local path nor"),
        ([str(tmp_path / "a-${HOME}.tar")], "cannot be expanded|does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            expand(patterns)
    (tmp_path / "copy.tar").write_bytes((tmp_path / "s-000.tar").read_bytes())
    with pytest.raises(UserError, match="identical"):
        scan([first, str(tmp_path / "copy.tar")])


def test_scan_measures_the_file(tmp_path: Path) -> None:
    pattern = scene_shards(tmp_path, shards=2, images=3)
    manifest = scan([pattern])
    assert [s.name for s in manifest.shards] == ["00000-s-000.tar", "00001-s-001.tar"]
    for entry in manifest.shards:
        path = Path(entry.path)
        assert (entry.bytes, entry.sha256, entry.samples) == (path.stat().st_size, sha256_of(path), 3)


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "png")
    assert buffer.tell() < 100_000
    path = write_tar(tmp_path / "a.tar", [("bomb.png", buffer.getvalue()), ("big.png", png(0, 64))])
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 10_000 if buffer.tell() < 10_000 else buffer.tell())
    assert "pixels" in reasons(path)["bomb"]
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 100)
    assert "limit is 100" in reasons(path)["big"]


def test_reasons_can_be_shown_and_stored(tmp_path: Path) -> None:
    """A member's extension is anybody's: bytes that are no text, commands to the terminal, thousands of them."""
    names = ["a.x\udcff", "b.\x1b[2J", "c.x\ny", "d.x\udcff", "d.x\udcff", *(f"e.field-{i}" for i in range(2000))]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    found = reasons(path)
    assert list(found) == list("abcde")
    assert "has more than 1000 members" in found["e"]
    for key, reason in found.items():
        assert reason.isprintable()
        assert len(reason) <= 300
        assert Skipped(key=key, reason=reason).model_dump_json()


@pytest.mark.parametrize("size", [(1, 60_000), (101, 1), (60_000, 300)])
def test_lines_of_pixels_are_refused_before_they_are_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "png")
    path = write_tar(tmp_path / "a.tar", [("line.png", buffer.getvalue()), ("ok.png", png())])
    assert keys(path) == ["ok"]
    assert reasons(path)["line"] == f"image has {size[0]} x {size[1]} pixels: one side is more than 100 times the other"


def test_what_webdataset_passes_over_is_no_sample(tmp_path: Path) -> None:
    members = ["._a.png", "d/._b.png", "__index__", "__meta__.json", "__meta__/x.png", "__MACOSX__/._c"]
    path = write_tar(tmp_path / "a.tar", [*((name, b"x") for name in members), ("a.png", png()), ("__b__.png", png(1))])
    assert [(key, type(value)) for key, value in read_shard(path)] == [("a", Image.Image), ("__b__", Image.Image)]
    assert scan([str(path)]).shards[0].samples == 2


class FailingDisk(io.BytesIO):
    """A file whose disk or server fails after some bytes."""

    number, after = errno.EIO, 1024

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= self.after:
            raise OSError(self.number, os.strerror(self.number))
        return super().read(size)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("after", [0, 1024])
def test_a_failing_disk_is_not_a_damaged_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: int
) -> None:
    """A UserError would end the build; these are tried again."""
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(4)])
    handle = FailingDisk(path.read_bytes())
    handle.number, handle.after = number, after
    with pytest.raises(OSError, match=r"a\.tar") as caught:
        list(read_samples(handle, path))
    assert caught.value.errno == number

    def refuses(self: Path, mode: str) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "open", refuses)
    with pytest.raises(OSError, match=r"a\.tar"):
        opened(path)


def test_a_file_that_is_not_there_or_not_ours_is_final(tmp_path: Path) -> None:
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    for path in (tmp_path / "none.tar", tmp_path, tmp_path / "loop.tar", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot read shard"):
            opened(path)


def test_long_lists_are_checked_in_no_time(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", png())])
    (tmp_path / "links").mkdir()
    for number in range(12_000):
        (tmp_path / "links" / f"{number:05d}.tar").symlink_to(path)
    started = time.process_time()
    assert len(expand([str(tmp_path / "links" / "{00000..11999}.tar")])) == 12_000
    assert time.process_time() - started < 5  # one pass a path took half a minute


def test_links_and_strange_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in ("../../up.png", "new\nline.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            archive.addfile(info, io.BytesIO(png()))
    assert keys(path) == ["../../up"]
    assert "link" in reasons(path)["link"]
    assert len(reasons(path)) == 2
