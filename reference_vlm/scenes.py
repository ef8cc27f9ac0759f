"""Procedural scenes: coloured shapes and a printed character on a textured background, with known boxes.

A scene is a rectangle of whole 8-pixel patches, at most 12 x 12 of them. The rectangle may be smaller than the 96 x 96
canvas the vision tower sees: `render(..., canvas=True)` places it on a grey canvas, and `Scene.visible` says which patches
belong to it, so that training can remove the padding as any-resolution VLMs do and the visual length varies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

PATCH = 8
GRID = 12
SIDE = PATCH * GRID
PADDING = 128
SMALLEST = 11
"""Least width of an object, pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (40, 180, 50),
    "blue": (45, 75, 230),
    "yellow": (245, 220, 40),
    "purple": (150, 50, 190),
    "orange": (250, 140, 20),
    "cyan": (50, 215, 225),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUNDS = ("plain", "gradient", "stripes", "checker", "clouds", "clutter")
SPLITS = {"train": 0, "codebook": 1, "validation": 2, "test": 3}

# 5 x 7 bitmaps, one string of 35 cells per character.
GLYPHS: dict[str, str] = {
    "0": "01110100011000110001100011000101110",
    "1": "00100011000010000100001000010001110",
    "2": "01110100010000100110010001000011111",
    "3": "11110000010000101110000010000111110",
    "4": "00010001100101010010111110001000010",
    "5": "11111100001111000001000011000101110",
    "6": "00110010001000011110100011000101110",
    "7": "11111000010001000100010000100001000",
    "8": "01110100011000101110100011000101110",
    "9": "01110100011000101111000010001001100",
    "c": "01110100011000010000100001000101110",
    "e": "11111100001000011110100001000011111",
    "f": "11111100001000011110100001000010000",
    "h": "10001100011000111111100011000110001",
    "k": "10001100101010011000101001001010001",
    "l": "10000100001000010000100001000011111",
    "p": "11110100011000111110100001000010000",
    "t": "11111001000010000100001000010000100",
    "x": "10001100010101000100010101000110001",
    "z": "11111000010001000100010001000011111",
}


@dataclass(frozen=True)
class Item:
    """One object (or the printed plate, `shape == "glyph"`) with its box in content pixels, right and bottom exclusive."""

    shape: str
    color: str
    x: int
    y: int
    size: int
    height: int

    @property
    def center(self) -> tuple[float, float]:
        """Centre (x, y) in content pixels."""
        return self.x + self.size / 2, self.y + self.height / 2

    @property
    def name(self) -> str:
        """What a question calls it: "red circle"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A drawn scene: `columns` x `rows` patches of content at patch offset (`left`, `top`) of the canvas."""

    seed: tuple[int, int]
    columns: int
    rows: int
    left: int
    top: int
    background: str
    objects: tuple[Item, ...]
    glyph: Item | None = None
    glyph_text: str = ""

    @property
    def visible(self) -> np.ndarray:
        """Mask [GRID * GRID] of the canvas patches that show content, raster order."""
        mask = np.zeros((GRID, GRID), bool)
        mask[self.top : self.top + self.rows, self.left : self.left + self.columns] = True
        return mask.reshape(-1)


def make_scene(
    split: str,
    index: int,
    *,
    size: tuple[int, int] | None = (GRID, GRID),
    background: str | None = None,
    smallest: int = SMALLEST,
) -> Scene:
    """Draw scene number `index` of a split; splits never share a random stream.

    Args:
        split: one of `SPLITS`.
        index: scene number, >= 0.
        size: (columns, rows) in patches, each 2..12; None draws one.
        background: one of `BACKGROUNDS`; None draws one.
        smallest: least width of an object, pixels (wider than the picture: what fits).
    """
    seed = (SPLITS[split], index)
    rng = np.random.default_rng(seed)
    drawn = draw_size(rng)
    columns, rows = size or drawn
    left = int(rng.integers(0, GRID - columns + 1))
    top = int(rng.integers(0, GRID - rows + 1))
    chosen = background or BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    taken: list[Item] = []
    glyph, text = None, ""
    if min(columns, rows) >= 5 and rng.random() < 0.6:
        glyph = _place(rng, taken, columns, rows, "glyph", "white", 16, 20)
        text = str(rng.choice(list(GLYPHS)))
    objects = _draw_objects(rng, taken, columns, rows, smallest)
    if glyph not in taken:
        glyph = None
    return Scene(seed, columns, rows, left, top, chosen, tuple(objects), glyph, text if glyph else "")


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Draw a content size (columns, rows): 45% full, else wide, tall, small, down to icons of 2 x 2 patches."""
    kind = rng.random()
    if kind < 0.45:
        return GRID, GRID
    low, high = (6, GRID) if kind < 0.7 else (3, 7) if kind < 0.85 else (2, 3)
    columns, rows = rng.integers(low, high + 1, 2)
    return int(columns), int(rows)


def _draw_objects(rng: np.random.Generator, taken: list[Item], columns: int, rows: int, smallest: int) -> list[Item]:
    limit = max(1, min(5, columns * rows // 4))  # few visual tokens must not mean few objects
    wanted = int(rng.integers(1, limit + 1))
    shapes, colors = list(SHAPES), list(COLORS)
    theme = rng.random()  # repeated shapes or colours make counting questions worth asking
    if theme < 0.25:
        shapes = shapes[(k := int(rng.integers(len(shapes)))) : k + 1] * 3 + shapes
    elif theme < 0.5:
        colors = colors[(k := int(rng.integers(len(colors)))) : k + 1] * 3 + colors
    objects: list[Item] = []
    room = 0.8 * (columns * rows / wanted) ** 0.5 * PATCH
    largest = min(34, min(columns, rows) * PATCH, round(room))
    for _ in range(wanted):
        least = min(smallest, largest)
        size = round(least * (largest / least) ** rng.random())  # small ones are the more common, as in photographs
        item = _place(rng, taken, columns, rows, str(rng.choice(shapes)), str(rng.choice(colors)), size, size)
        if item is not None:
            objects.append(item)
    if not objects:  # the plate took all the room: it goes, a scene always shows an object
        taken.clear()
        return _draw_objects(rng, taken, columns, rows, smallest)
    return objects


def _place(
    rng: np.random.Generator, taken: list[Item], columns: int, rows: int, shape: str, color: str, size: int, height: int
) -> Item | None:
    for _ in range(20):
        x = int(rng.integers(0, columns * PATCH - size + 1))
        y = int(rng.integers(0, rows * PATCH - height + 1))
        if all(x >= o.x + o.size + 2 or o.x >= x + size + 2 or y >= o.y + o.height + 2 or o.y >= y + height + 2 for o in taken):
            item = Item(shape, color, x, y, size, height)
            taken.append(item)
            return item
    return None


def render(scene: Scene, *, canvas: bool = False) -> Image.Image:
    """Render a scene to RGB: its content alone, or on the padded 96 x 96 canvas (`canvas=True`)."""
    rng = np.random.default_rng((*scene.seed, 7))
    image = Image.fromarray(_background(rng, scene.background, scene.columns * PATCH, scene.rows * PATCH))
    for item in scene.objects:
        rgb = tuple(int(np.clip(c + rng.integers(-15, 16), 0, 255)) for c in COLORS[item.color])
        image.paste(Image.new("RGB", (item.size, item.size), rgb), (item.x, item.y), shape_mask(item.shape, item.size))
    if scene.glyph is not None:
        _print_glyph(image, scene.glyph, scene.glyph_text)
    if not canvas:
        return image
    padded = Image.new("RGB", (SIDE, SIDE), (PADDING,) * 3)
    padded.paste(image, (scene.left * PATCH, scene.top * PATCH))
    return padded


@lru_cache(maxsize=256)
def shape_mask(shape: str, size: int) -> Image.Image:
    """Antialiased mask (mode L, size x size) of a shape that fills its box."""
    big = size * 3
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    box = (0, 0, big - 1, big - 1)
    if shape in ("circle", "ring"):
        draw.ellipse(box, fill=255)
        if shape == "ring":
            hole = big * 0.27
            draw.ellipse((hole, hole, big - hole, big - hole), fill=0)
    elif shape == "square":
        draw.rectangle((big * 0.06, big * 0.06, big * 0.94, big * 0.94), fill=255)
    elif shape == "triangle":
        draw.polygon([(big / 2, 0), (big, big), (0, big)], fill=255)
    elif shape == "cross":
        draw.rectangle((big * 0.34, 0, big * 0.66, big), fill=255)
        draw.rectangle((0, big * 0.34, big, big * 0.66), fill=255)
    else:
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 0.52, 0.21) * big
        draw.polygon(
            [(big / 2 + r * np.cos(a), big * 0.53 + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)], fill=255
        )
    return mask.reduce(3)


def _background(rng: np.random.Generator, style: str, width: int, height: int) -> np.ndarray:
    """Muted texture [height, width, 3] uint8: never saturated, so it is never mistaken for an object."""
    base = rng.integers(70, 165) + rng.integers(-14, 15, 3)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    level = np.zeros((height, width), np.float32)
    if style == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        level = (np.cos(angle) * x + np.sin(angle) * y) / SIDE * 60
    elif style == "stripes":
        angle, period = rng.uniform(0, np.pi), rng.uniform(5, 16)
        level = 18 * np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period)
    elif style == "checker":
        cell = int(rng.integers(4, 14))
        level = 24 * (((x // cell) + (y // cell)) % 2)
    elif style == "clouds":
        coarse = rng.normal(0, 22, (height // 12 + 2, width // 12 + 2)).astype(np.float32)
        level = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    pixels = base + level[..., None] + rng.normal(0, rng.uniform(1, 9), (height, width, 1))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if style == "clutter":
        draw = ImageDraw.Draw(image)
        for _ in range(width * height // 220):
            gray = rng.integers(60, 180) + rng.integers(-12, 13, 3)
            ends = rng.integers(0, (width, height, width, height))
            ends[2:] = ends[:2] + rng.integers(-14, 15, 2)
            draw.line([int(v) for v in ends], fill=tuple(int(v) for v in gray), width=int(rng.integers(1, 3)))
    return np.asarray(image)


def _print_glyph(image: Image.Image, plate: Item, text: str) -> None:
    cells = np.array(list(GLYPHS[text]), np.uint8).reshape(7, 5)
    panel = np.full((plate.height, plate.size, 3), 225, np.uint8)
    panel[3:17, 3:13][np.kron(cells, np.ones((2, 2), np.uint8)).astype(bool)] = 20
    image.paste(Image.fromarray(panel), (plate.x, plate.y))


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Dense supervision on the canvas grid, each [GRID * GRID].

    shape, color, glyph: class of the item that covers most of the patch (0 = none). offset: [.., 2], from the patch's centre
    to the item's centre in patches. size: item width in patches (0 = none). where: [.., 2], the patch's centre as a fraction of
    the picture's width and height (outside it below 0 or above 1).
    """
    cover = np.full((GRID * PATCH, GRID * PATCH), -1)
    items = [*scene.objects, *([scene.glyph] if scene.glyph else [])]
    x0, y0 = scene.left * PATCH, scene.top * PATCH
    for i, item in enumerate(items):
        region = cover[y0 + item.y : y0 + item.y + item.height, x0 + item.x : x0 + item.x + item.size]
        mask = np.ones_like(region, bool) if item.shape == "glyph" else np.asarray(shape_mask(item.shape, item.size)) > 127
        region[mask] = i
    patches = cover.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    counts = np.stack([(patches == i).sum(1) for i in range(len(items))], 1)
    owner = np.where(counts.max(1) >= 6, counts.argmax(1), -1)
    labels = {name: np.zeros(GRID * GRID, np.int64) for name in ("shape", "color", "glyph")}
    labels["offset"], labels["size"] = np.zeros((GRID * GRID, 2), np.float32), np.zeros(GRID * GRID, np.float32)
    cells = np.arange(GRID * GRID)
    labels["where"] = np.stack(
        [(cells % GRID + 0.5 - scene.left) / scene.columns, (cells // GRID + 0.5 - scene.top) / scene.rows], 1
    ).astype(np.float32)
    for i, item in enumerate(items):
        mine = owner == i
        if item.shape == "glyph":
            labels["glyph"][mine] = 1 + list(GLYPHS).index(scene.glyph_text)
        else:
            labels["shape"][mine] = 1 + SHAPES.index(item.shape)
            labels["color"][mine] = 1 + list(COLORS).index(item.color)
        cx, cy = (item.center[0] + x0) / PATCH, (item.center[1] + y0) / PATCH
        labels["offset"][mine] = np.stack([cx - (cells % GRID + 0.5), cy - (cells // GRID + 0.5)], 1)[mine]
        labels["size"][mine] = item.size / PATCH
    return labels
