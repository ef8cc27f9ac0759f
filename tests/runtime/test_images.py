"""Image files that may be anything become upright 8-bit RGB, or one clear line."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import noise_image
from PIL import Image

from codebook_prune import UserError
from codebook_prune.images import open_image


def pixels(path: Path) -> Any:
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    upright = noise_image(0, (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert (pixels(tmp_path / "turned.png") == np.asarray(upright)).all()


RAMP = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (8, 1))
GREY = Image.fromarray(RAMP)
MODES = {
    "grey.png": (GREY, 0),
    "palette.png": (GREY.convert("P"), 0),
    "palette.gif": (GREY.convert("P"), 0),
    "cmyk.tif": (GREY.convert("RGB").convert("CMYK"), 1),
    "black-and-white.png": (GREY.convert("1", dither=Image.Dither.NONE), 128),
    "16-bit.png": (Image.fromarray(RAMP.astype(np.uint16) * 257), 0),
    "16-bit.tif": (Image.fromarray(RAMP.astype(np.uint16) * 257), 0),
    "32-bit.tif": (Image.fromarray(RAMP.astype(np.int32) * 257), 0),
}


@pytest.mark.parametrize("name", list(MODES))
def test_every_mode_becomes_rgb_of_the_same_look(tmp_path: Path, name: str) -> None:
    image, tolerance = MODES[name]
    image.save(tmp_path / name)
    assert np.abs(pixels(tmp_path / name) - RAMP[..., None]).max() <= tolerance


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((1, 1), (200, 0, 0, 255))
    image.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[1, 1].tolist() == [200, 0, 0]
    assert pixels(tmp_path / "a.png")[0, 0].tolist() == [255, 255, 255]


def damaged(folder: Path) -> dict[str, Path]:
    whole = folder / "whole.png"
    noise_image(1, (60, 60)).save(whole)
    noise_image(1, (60, 60)).save(folder / "whole.jpg")
    paths = {name: folder / name for name in MESSAGES}
    paths["folder.png"].mkdir()
    paths["empty.png"].write_bytes(b"")
    paths["text.png"].write_text("these are words")
    paths["cut.png"].write_bytes(whole.read_bytes()[:3000])
    paths["cut.jpg"].write_bytes((folder / "whole.jpg").read_bytes()[:900])
    os.mkfifo(paths["pipe.png"])
    data = bytearray(whole.read_bytes())
    data[2000:2100] = bytes(100)
    paths["flipped.png"].write_bytes(data)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    body = struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    paths["bomb.png"].write_bytes(b"\x89PNG\r\n\x1a\n" + body + end)
    Image.new("L", (9000, 9000)).save(paths["large.png"])
    Image.new("L", (1, 60_000)).save(paths["line.png"])
    Image.fromarray(np.ones((4, 4), np.float32)).save(paths["float.tif"])
    return paths


MESSAGES = {
    "missing.png": "does not exist",
    "folder.png": "not a regular file",
    "empty.png": "not an image file",
    "text.png": "not an image file",
    "cut.png": "damaged or cut short",
    "cut.jpg": "damaged or cut short",
    "pipe.png": "not a regular file",
    "flipped.png": "damaged or cut short",
    "bomb.png": "60000 x 60000 pixels|damaged",
    "large.png": "9000 x 9000 pixels, the limit is",
    "line.png": "1 x 60000 pixels: one side is more than 100 times the other",
    "float.tif": "floating-point",
}


@pytest.mark.parametrize("name", list(MESSAGES))
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = damaged(tmp_path)[name]
    with pytest.raises(UserError, match=MESSAGES[name]) as caught:
        open_image(path)
    assert "\n" not in str(caught.value)
    assert name.split(".", maxsplit=1)[0] in str(caught.value) or name == "float.tif"


def test_every_truncation_gives_an_image_or_one_line(tmp_path: Path) -> None:
    for kind in ("png", "jpg", "gif", "webp", "tiff", "bmp"):
        noise_image(2, (24, 24)).save(tmp_path / f"whole.{kind}")
        data = (tmp_path / f"whole.{kind}").read_bytes()
        for cut in range(0, len(data) - 40, max(1, len(data) // 40)):
            path = tmp_path / f"cut.{kind}"
            path.write_bytes(data[:cut])
            message = ""
            try:
                open_image(path)
            except UserError as error:
                message = str(error)
            assert "\n" not in message
