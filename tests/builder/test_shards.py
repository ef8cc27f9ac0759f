"""The strict shard reader: what is readable is read, the rest is an error or is reported, nothing is lost silently."""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

import pytest
from building import png, scene_shards, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from codebook_builder import shards
from codebook_builder.shards import expand, read_shard, scan, split_name, write_shard
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
