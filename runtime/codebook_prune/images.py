"""Reading image files that may be anything."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from codebook_schemas import UserError

MAX_PIXELS = 1 << 26
"""Largest image that is decoded (67 million pixels, 200 MB as RGB); the header says the size before anything is decoded."""
MAX_ASPECT = 100
"""Most times that one side may be as long as the other. Strips of panoramas stay below 50; models that scale the shorter side
to theirs would make gigabytes of a line of pixels."""


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file as upright 8-bit RGB.

    The EXIF orientation is applied, transparency is laid on white, 16-bit greys are scaled down; of an animation, the first
    frame.

    Args:
        path: a regular file in any format Pillow reads.
        max_pixels: refuse larger images without decoding them.

    Raises:
        UserError: no such file, not an image, damaged or cut short, larger than `max_pixels`, or longer than `MAX_ASPECT` times
            its width (or the other way round).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"image {path} {'is not a regular file' if path.exists() else 'does not exist'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning about large images: the limit here is lower
            with Image.open(path) as image:
                size = f"{image.width} x {image.height} pixels"
                if image.width * image.height > max_pixels:
                    raise UserError(f"image {path} has {size}, the limit is {max_pixels} in all: scale it down first")
                if too_narrow(image.size):
                    raise UserError(f"image {path} has {size}: one side is more than {MAX_ASPECT} times the other")
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


def too_narrow(size: tuple[int, int]) -> bool:
    """Whether an image of that (width, height) has sides that differ more than `MAX_ASPECT` times."""
    return max(size) > MAX_ASPECT * min(size)


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
