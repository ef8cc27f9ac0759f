"""Shards nobody has checked: what can be read is read right, everything else is counted and listed, and nothing runs."""

from __future__ import annotations

import gzip
import io
import pickle
import resource
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from building import png, small_config, write_tar
from conftest import noise_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from benchmarks.hostile import Code
from codebook_builder.build import Build
from codebook_builder.shards import MAX_KEY, read_shard, scan
from codebook_builder.worker import run_locally
from codebook_prune.codebook import Codebook
from codebook_schemas import UserError

RAMP = np.tile(np.linspace(0, 255, 32).round().astype(np.uint8), (16, 1))
GREY = Image.fromarray(RAMP)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds nothing."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT")
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)


def png_with_text(size: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * size, zip=True)
    return encoded(GREY, "png", pnginfo=info)


JPEG = encoded(noise_image(3, (64, 64)), "jpeg")
FRAMES = [GREY.convert("RGB"), noise_image(1, (32, 16))]
READ_RIGHT = {
    "cmyk.jpg": (encoded(GREY.convert("RGB").convert("CMYK"), "jpeg", quality=100), 3),
    "grey.jpg": (encoded(GREY, "jpeg", quality=100), 3),
    "16-bit.png": (encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "png"), 0),
    "palette.png": (encoded(GREY.convert("P"), "png"), 0),
    "alpha.png": (encoded(GREY.convert("LA"), "png"), 0),
    "turned.png": (encoded(GREY.transpose(Image.Transpose.ROTATE_90), "png", exif=exif(6)), 0),
    "animated.png": (encoded(FRAMES[0], "png", save_all=True, append_images=FRAMES[1:]), 0),
    "animated.webp": (encoded(FRAMES[0], "webp", save_all=True, append_images=FRAMES[1:], lossless=True), 0),
    "UPPER.PNG": (encoded(GREY, "png"), 0),
}
LISTED = {
    "zero.png": (b"", "cannot decode PNG"),
    "words.jpg": (b"these are words", "cannot decode JPEG"),
    "wrong-extension.jpg": (encoded(GREY, "png"), "cannot decode JPEG"),
    "wrong-extension.png": (JPEG, "cannot decode PNG"),
    "short.jpg": (JPEG[: len(JPEG) // 2], "cannot decode JPEG: OSError: image file is truncated"),
    "short.png": (png(0, 64)[:3000], "cannot decode PNG"),
    "header-only.jpg": (JPEG[:30], "cannot decode JPEG"),
    "hole.png": (png(0, 64)[:300] + bytes(200) + png(0, 64)[500:], "cannot decode PNG"),
    "huge.png": (png_header(100_000, 100_000), "pixels"),
    "large.png": (png_header(9000, 9000), "9000 x 9000 pixels, the limit is"),
    "bomb.png": (encoded(Image.new("1", (12_000, 12_000)), "png"), "12000 x 12000 pixels"),
    "text-bomb.png": (png_with_text(200 << 20), "cannot decode PNG: ValueError: Decompressed data too large"),
    "animation.gif": (encoded(GREY.convert("P"), "gif"), "no image members"),
    "vector.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "no image members"),
    "script.eps": (b"%!PS-Adobe\n%%BoundingBox: 0 0 9 9\n(x) run", "no image members"),
    "script.png": (b"%!PS-Adobe\n%%BoundingBox: 0 0 9 9\n(x) run", "cannot decode PNG"),
    "clip.mp4": (b"#EXTM3U\nhttp://127.0.0.1:9/x", "no image members"),
    "noextension": (b"x", "no image members"),
    "bomb.png.gz": (gzip.compress(bytes(64 << 20)), "no image members"),
    "bomb.jpg.gz": (gzip.compress(bytes(64 << 20)), "no image members"),
    "/absolute.txt": (b"x", "no image members"),
    "k" * (MAX_KEY + 1) + ".png": (png(), f"key is longer than {MAX_KEY}"),
    "esc\x1b[2J.png": (png(), "not printable"),
    "not-utf8-\udcff.png": (png(), "not printable"),
}


def between(folder: Path, name: str, data: bytes) -> list[tuple[str, Any]]:
    """The samples of a shard with one member between two good ones."""
    path = folder / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        for member, content in (("first.png", png(1)), (name, data), ("last.png", png(2))):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    samples = list(read_shard(path))
    assert [samples[0][0], samples[-1][0]] == ["first", "last"]
    assert not isinstance(samples[0][1], str)
    assert not isinstance(samples[-1][1], str)
    assert scan([str(path)]).shards[0].samples == len(samples) == 3
    return samples


@pytest.mark.parametrize("name", READ_RIGHT)
def test_unusual_images_are_read_right(tmp_path: Path, name: str) -> None:
    data, tolerance = READ_RIGHT[name]
    image = between(tmp_path, name, data)[1][1]
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - RAMP[..., None]).max() <= tolerance


@pytest.mark.parametrize("name", LISTED, ids=lambda name: ascii(name)[1:40])
def test_unusable_samples_are_listed_and_cost_nothing_else(tmp_path: Path, name: str) -> None:
    data, message = LISTED[name]
    tracemalloc.start()
    try:
        key, reason = between(tmp_path, name, data)[1]
        assert tracemalloc.get_traced_memory()[1] < 2 * len(data) + (8 << 20)
    finally:
        tracemalloc.stop()
    assert message in reason
    assert "\n" not in reason
    assert key.isprintable()


@pytest.mark.parametrize("cut", [300, 700, 1100])
def test_jpegs_with_flipped_bits_are_images_or_listed(tmp_path: Path, cut: int) -> None:
    rng = np.random.default_rng(cut)
    for _ in range(30):
        data = bytearray(JPEG)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        _, value = between(tmp_path, "flipped.jpg", bytes(data[: len(data) - cut * int(rng.integers(2))]))[1]
        assert isinstance(value, Image.Image) or value.startswith("cannot decode") or "pixels" in value


PAX = {"size": ["99999999999999999999999999", "-1", "x", "1e9", "0"], "path": ["../../x.png", "x" * 5000, ""],
       "GNU.sparse.major": ["1"], "GNU.sparse.map": ["0,1,x", "9" * 30 + ",1"], "hdrcharset": ["BINARY"], "mtime": ["inf"],
       "GNU.sparse.realsize": ["99999999999999999999"], "linkpath": ["/etc/passwd"], "uid": ["9" * 40]}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(k, v) for k, values in PAX.items() for v in values], ids=lambda x: x[:12])
def test_extended_headers_lie_in_vain(tmp_path: Path, field: str, value: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("0.png", "1.png", "2.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            if name == "1.png":
                info.pax_headers = {field: value}
            archive.addfile(info, io.BytesIO(png()))
    said = ""
    try:
        assert len(list(read_shard(path))) == scan([str(path)]).shards[0].samples == 3
    except UserError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 3 * 512 - 1), flip=st.integers(1, 255))
def test_a_damaged_extended_header_is_never_silent(tmp_path_factory: pytest.TempPathFactory, place: int, flip: int) -> None:
    path = tmp_path_factory.mktemp("pax") / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("\u00e9" * 120 + ".png", "1.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            archive.addfile(info, io.BytesIO(png()))
    data = bytearray(path.read_bytes())
    data[place] ^= flip
    path.write_bytes(data)
    samples = 2
    try:
        samples = len(list(read_shard(path)))
    except UserError:
        return
    assert samples == 2


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_hundred_thousand_tiny_samples(tmp_path: Path) -> None:
    """Memory holds their keys, not their headers."""
    count = 100_000
    info = tarfile.TarInfo("000000.txt")
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    base = int(bytes(header[148:154]), 8)
    with open(tmp_path / "a.tar", "wb") as file:
        for number in range(count):
            digits = b"%06d" % number
            header[:6] = digits
            header[148:154] = b"%06o" % (base + sum(digits) - 6 * 48)
            file.write(header)
        file.write(bytes(1024))
    before, found, growth = resident(), 0, 0
    for _, value in read_shard(tmp_path / "a.tar"):
        found += isinstance(value, str)
        if found % 20_000 == 0:
            growth = max(growth, resident() - before)
    assert found == count
    assert growth < 48 << 20  # kept headers would be 100 MB


def test_a_build_over_poison_is_the_build_without_it(tmp_path: Path) -> None:
    """Every hazard among good samples: the same prototypes, every bad sample listed once, and no code ran."""
    canary = tmp_path / "canary"
    limits = {"top1_prob": 0.9, "influence": 0.9}  # quantiles are taken over the first samples, bad ones counted
    code = pickle.dumps(Code(str(canary)))
    good = [(f"good{i}.png", png(i, 96)) for i in range(6)]
    bad = [(name, data) for name, (data, _) in LISTED.items() if "\udcff" not in name]
    bad += [(f"code.{kind}", code) for kind in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "ten", "mp")]
    bad += [("code2.png", code), ("../../canary.png", code), ("good0.png", png(9, 96)), ("two.png", png()), ("two.jpg", png())]
    mixed = [*good[:3], *bad[: len(bad) // 2], *good[3:5], *bad[len(bad) // 2 :], good[5]]
    samples = {name.split(".")[0] if "/" not in name else name for name, _ in bad}
    for folder, members in (("clean", good), ("poison", mixed)):
        (tmp_path / folder).mkdir()
        shard = write_tar(tmp_path / folder / "s.tar", members)
        config = small_config(str(shard), tmp_path / folder / "book", cluster={"max_bad_fraction": 1.0}, thresholds=limits)
        report = Build(config, lambda tasks: run_locally(tasks, attempts=1), quiet=True).codebook()
    assert report.counts["images"] == len(good)
    assert report.skipped == scan([str(shard)]).shards[0].samples - len(good) > len(samples) * 0.8
    clean, poison = (Codebook.from_pretrained(tmp_path / folder / "book") for folder in ("clean", "poison"))
    assert (clean.prototypes == poison.prototypes).all()
    assert not canary.exists()
    assert list(tmp_path.rglob("canary*")) == []


def test_shard_lists_run_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for pattern in (f"pipe:touch {canary}", f"$(touch {canary}).tar", f"`touch {canary}`", f"a.tar; touch {canary}"):
        with pytest.raises(UserError):
            scan([pattern])
    assert not canary.exists()
