"""Pictures of what a pruner kept."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from codebook_schemas import UserError
from codebook_schemas.files import replace_atomically

SMALLEST_SIDE = 480
DIM = (0.35, 60)
"""Factor and offset of the grey that dropped cells fade to: dark beside bright places, and still grey beside dark ones."""
Box = tuple[float, float, float, float]


def draw_overlay(image: Image.Image, position: Tensor, kept: Tensor, *, seen: Box | None = None) -> Image.Image:
    """The image with the places of dropped tokens faded to grey.

    Small images are enlarged by a whole factor first, and cells have hard edges, so the picture is crisp at any size.

    Args:
        image: RGB.
        position: [n, 2] (row, column) of every token; (-1, -1) is no place (newlines).
        kept: [n] bool.
        seen: the part (left, top, right, bottom) of the image that the grid covers, see `seen_box`; default: all of it.
    """
    edges = seen or (0, 0, *image.size)
    image, scale = enlarged(image)
    left, top, right, bottom = (round(edge * scale) for edge in edges)
    rows, columns = (position.max(0).values + 1).tolist()
    cells = np.zeros((rows, columns), np.uint8)
    for (row, column), stays in zip(position.tolist(), kept.tolist(), strict=True):
        if row >= 0 and stays:
            cells[row, column] = 255
    mask = Image.new("L", image.size, 0)
    mask.paste(Image.fromarray(cells).resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    dim = ImageOps.grayscale(image).point([int(value * DIM[0] + DIM[1]) for value in range(256)]).convert("RGB")
    return Image.composite(image, dim, mask)


def enlarged(image: Image.Image) -> tuple[Image.Image, int]:
    """A small image enlarged by the whole factor that makes its longer side at least `SMALLEST_SIDE`, and that factor."""
    scale = max(1, -(-SMALLEST_SIDE // max(image.size)))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST), scale


def seen_box(image: Image.Image, image_processor: Any) -> Box | None:
    """The part of an image a processor keeps when it crops the centre (CLIP: shortest edge resized, square cut out).

    None when it does not crop.
    """
    shortest = dict(getattr(image_processor, "size", None) or {}).get("shortest_edge")
    crop = getattr(image_processor, "crop_size", None)
    if not getattr(image_processor, "do_center_crop", False) or not crop or not shortest:
        return None
    per_pixel = min(image.size) / shortest
    width, height = (min(crop[key] * per_pixel, side) for key, side in zip(("width", "height"), image.size, strict=True))
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return left, top, left + width, top + height


def side_by_side(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Pictures in a row, scaled to one height, each with its caption underneath."""
    height = max(picture.height for picture in pictures)
    scaled = [p if p.height == height else p.resize((round(p.width * height / p.height), height)) for p in pictures]
    font = ImageFont.load_default(max(14, height // 28))
    band = 2 * max(14, height // 28)
    sheet = Image.new("RGB", (sum(p.width for p in scaled) + 8 * (len(scaled) - 1), height + band), "white")
    pen, x = ImageDraw.Draw(sheet), 0
    for picture, caption in zip(scaled, captions, strict=True):
        sheet.paste(picture, (x, 0))
        pen.text((x + picture.width / 2, height + band / 2), caption, fill="black", font=font, anchor="mm")
        x += picture.width + 8
    return sheet


def check_picture_path(path: Path) -> None:
    """Refuse a path no picture can be written to (raises UserError); called before any work is done."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"cannot write a picture to {path}: give a name that ends in .png, .jpg or .webp")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all, in the format its name asks for.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.BytesIO()
    picture.save(buffer, format=Image.registered_extensions()[path.suffix.lower()], quality=95)
    try:
        replace_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
