"""The control "a smaller image": the reference VLM given fewer visual tokens by giving it a smaller picture.

A model that takes images of any size would simply be given a smaller one. The reference VLM's tower always sees its whole
canvas, but was trained with small pictures on grey whose padding was removed, so this is the same thing for it: shrink the
picture, put it in the corner of the canvas, and let only the tokens that show it enter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import VisualTokens
from reference_vlm.scenes import PADDING, PATCH, SIDE


def smaller_grid(tokens: float) -> tuple[int, int]:
    """(rows, columns) of the almost square grid whose size is nearest to `tokens`, the smaller of equally near ones."""
    side = math.isqrt(max(1, int(tokens)))
    grids = [(side, side), (side, side + 1), (side + 1, side + 1)]
    return min(grids, key=lambda grid: (abs(grid[0] * grid[1] - tokens), grid))


def shrunk(picture: Image.Image, rows: int, columns: int) -> Image.Image:
    """The picture at rows x columns patches, in the top left corner of the grey canvas."""
    canvas = Image.new("RGB", (SIDE, SIDE), (PADDING,) * 3)
    canvas.paste(picture.convert("RGB").resize((columns * PATCH, rows * PATCH), Image.Resampling.LANCZOS))
    return canvas


@dataclass(frozen=True, kw_only=True)
class CornerPruner(Pruner):
    """Keeps the tokens of the canvas's top left `rows` x `columns`: what shows a shrunk picture."""

    rows: int
    columns: int
    threshold: float | None = 0.5

    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] float32: 0 inside the corner, 1 outside."""
        row, column = tokens.position.unbind(1)
        return ((row >= self.rows) | (column >= self.columns)).float()
