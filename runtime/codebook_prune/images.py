"""Reading image files that may be anything."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from codebook_schemas import UserError

MAX_PIXELS = 1 << 26
"""Largest image that is decoded (67 million pixels, 200 MB as RGB); the header says the size before anything is decoded."""


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file as upright 8-bit RGB.

    The EXIF orientation is applied, transparency is laid on white, 16-bit greys are scaled down; of an animation, the first
    frame.

    Args:
        path: a regular file in any format Pillow reads.
        max_pixels: refuse larger images without decoding them.

    Raises:
        UserError: no such file, not an image, damaged or cut short, or larger than `max_pixels`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"image {path} {'is not a regular file' if path.exists() else 'does not exist'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning about large images: the limit here is lower
            with Image.open(path) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width} x {image.height} pixels"
                    raise UserError(f"image {path} has {size}, the limit is {max_pixels} in all: scale it down first")
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"image {path} cannot be read: permission denied") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image file in a known format") from None
    except Exception as error:  # Pillow's parsers raise almost anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"image {path} is damaged or cut short: {reason}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any decoded image as 8-bit RGB; see `open_image`.

    Raises:
        UserError: floating-point pixels, whose scale is unknown.
    """
    if image.mode == "F":
        raise UserError("floating-point images have no known scale: convert it to 8 or 16 bits first")
    if image.mode.startswith("I"):  # 16-bit greys; Pillow widens some of them to 32 bits
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(np.round(grey / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        top = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", top.size, "white"), top).convert("RGB")
    return image.convert("RGB")
