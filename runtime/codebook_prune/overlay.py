"""Pictures of what a pruner kept."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from codebook_schemas import UserError
from codebook_schemas.files import replace_atomically

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SMALLEST_SIDE = 480
WIDEST_SHEET = 2400
GAP = 8
DIM = (0.35, 15)
"""Factor and offset of the grey that dropped cells fade to: dark, but not black."""
EDGE, GRID_LINE = (255, 255, 255), (92, 92, 92)
"""Colours around the kept cells and between the dropped ones; both are drawn on dropped cells only."""
SMALLEST_CELL = 12
"""Pixels a cell needs for lines between the dropped ones."""
Box = tuple[float, float, float, float]


def draw_overlay(image: Image.Image, position: Tensor, kept: Tensor, *, seen: Box | None = None) -> Image.Image:
    """The image with the places of dropped tokens faded to dark grey, a thin line around what was kept.

    Small images are enlarged by a whole factor first, and cells have hard edges, so the picture is crisp at any size. Kept
    cells keep their pixels.

    Args:
        image: RGB.
        position: [n, 2] (row, column) of every token; (-1, -1) is no place (newlines).
        kept: [n] bool.
        seen: the part (left, top, right, bottom) of the image that the grid covers, see `seen_box`; default: all of it.
    """
    edges = seen or (0, 0, *image.size)
    image, scale = enlarged(image)
    left, top, right, bottom = (round(edge * scale) for edge in edges)
    cells = np.zeros((position.max(0).values + 1).tolist(), np.uint8)
    for (row, column), stays in zip(position.tolist(), kept.tolist(), strict=True):
        if row >= 0 and stays:
            cells[row, column] = 255
    mask = Image.new("L", image.size, 0)
    mask.paste(Image.fromarray(cells).resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    dim = ImageOps.grayscale(image).point([int(value * DIM[0] + DIM[1]) for value in range(256)]).convert("RGB")
    _draw_grid(dim, (left, top, right, bottom), cells.shape)
    dim.paste(EDGE, mask=mask.filter(ImageFilter.MaxFilter(2 * min(4, max(image.size) // 240) + 1)))
    return Image.composite(image, dim, mask)


def _draw_grid(picture: Image.Image, box: tuple[int, int, int, int], shape: tuple[int, ...]) -> None:
    """Lines between the cells of a grid of `shape` (rows, columns) that covers `box`, where cells are large enough."""
    left, top, right, bottom = box
    rows, columns = shape
    if min((right - left) / columns, (bottom - top) / rows) < SMALLEST_CELL:
        return
    pen = ImageDraw.Draw(picture)
    for column in range(1, columns):
        x = left + (right - left) * column // columns
        pen.line((x, top, x, bottom - 1), fill=GRID_LINE)
    for row in range(1, rows):
        y = top + (bottom - top) * row // rows
        pen.line((left, y, right - 1, y), fill=GRID_LINE)


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
    whole = hasattr(image_processor, "image_grid_pinpoints")  # any resolution: crops of all of it
    if whole or not getattr(image_processor, "do_center_crop", False) or not crop or not shortest:
        return None
    per_pixel = min(image.size) / shortest
    width, height = (min(crop[key] * per_pixel, side) for key, side in zip(("width", "height"), image.size, strict=True))
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return left, top, left + width, top + height


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int, *, letters: float = 1 / 28) -> Image.Image:
    """Pictures in rows of `columns`, scaled to one height, each with its caption underneath, at most `WIDEST_SHEET` wide.

    `letters` is their size as a fraction of a picture's height.
    """
    height = max(picture.height for picture in pictures)
    widest = max(round(p.width * height / p.height) for p in pictures)
    height = max(1, min(height, height * (WIDEST_SHEET // min(columns, len(pictures)) - GAP) // widest))
    scaled = [p if p.height == height else p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    size = max(14, int(height * letters))
    lines = max(caption.count("\n") for caption in captions) + 1
    band, font = round((lines + 1) * 1.2 * size), ImageFont.load_default(size)
    rows = [range(i, min(i + columns, len(scaled))) for i in range(0, len(scaled), columns)]
    wide = max(sum(scaled[i].width + GAP for i in row) - GAP for row in rows)
    page = Image.new("RGB", (wide, len(rows) * (height + band)), "white")
    pen = ImageDraw.Draw(page)
    for y, row in zip(range(0, page.height, height + band), rows, strict=True):
        x = 0
        for i in row:
            page.paste(scaled[i], (x, y))
            text = "\n".join(_fitted(line, font, scaled[i].width) for line in captions[i].split("\n"))
            middle = (x + scaled[i].width / 2, y + height + band / 2)
            pen.multiline_text(middle, text, fill="black", font=font, anchor="mm", align="center")
            x += scaled[i].width + GAP
    return page


def _fitted(text: str, font: Any, width: int) -> str:
    """Text cut to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def overlay_paths(overlay: Path | None, files: Sequence[Path], suffixes: Sequence[str] = PICTURES) -> list[Path | None]:
    """Where the picture of each file goes: `overlay` itself for one file, with the file's stem in its name for several.

    Called before any work is done.

    Raises:
        UserError: nothing can be written there, or it would overwrite an input.
    """
    if overlay is None:
        return [None] * len(files)
    check_picture_path(overlay, suffixes)
    paths: list[Path | None] = []
    inputs, taken = {file.resolve() for file in files}, set[Path]()
    for number, file in enumerate(files, 1):
        path = overlay if len(files) == 1 else overlay.with_stem(f"{overlay.stem}-{file.stem}")
        if path in taken:
            path = overlay.with_stem(f"{overlay.stem}-{file.stem}-{number}")
        if path.resolve() in inputs:
            raise UserError(f"the overlay {path} would overwrite an input: choose another name")
        taken.add(path)
        paths.append(path)
    return paths


def check_picture_path(path: Path, suffixes: Sequence[str] = PICTURES) -> None:
    """Refuse a path no picture can be written to (raises UserError)."""
    if path.suffix.lower() not in suffixes:
        *others, last = suffixes
        raise UserError(f"cannot write the overlay to {path}: give a name that ends in {', '.join(others)} or {last}")
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
    save_bytes(buffer.getvalue(), path)


def save_bytes(data: bytes, path: Path) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        replace_atomically(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
