"""A yardstick, no method and no bound: a choice of tokens by someone who is told where the objects are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest

import numpy as np
import torch
from torch import Tensor

from codebook_prune.pruners.base import Positions, Pruner
from codebook_prune.visual_tokens import VisualTokens
from reference_vlm.evaluate import object_tokens
from reference_vlm.scenes import GRID, PATCH, Item, Scene


def order(scene: Scene, background: int) -> list[int]:
    """All tokens of a full-size scene, what to keep first.

    `background` tokens spread evenly over what shows no object, then one token of each object in turn, from its centre
    outwards, then the rest of the background.
    """
    items = [*scene.objects, *([scene.glyph] if scene.glyph else [])]
    on_objects = object_tokens(scene)
    behind = np.flatnonzero(~on_objects)
    spread = behind[np.linspace(0, len(behind) - 1, background).round().astype(int)] if background else behind[:0]
    turns = chain.from_iterable(zip_longest(*(_outwards(item, on_objects) for item in items)))
    first = [int(t) for t in spread]
    return list(dict.fromkeys([*first, *(t for t in turns if t is not None), *behind.tolist()]))


def _outwards(item: Item, on_objects: np.ndarray) -> list[int]:
    """Tokens an item's box touches, nearest to its centre first."""
    rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
    x, y = item.center
    inside = (columns * PATCH < item.x + item.size) & ((columns + 1) * PATCH > item.x)
    inside &= (rows * PATCH < item.y + item.height) & ((rows + 1) * PATCH > item.y)
    away = ((columns + 0.5) * PATCH - x) ** 2 + ((rows + 0.5) * PATCH - y) ** 2
    return [int(t) for t in np.argsort(np.where(inside & on_objects, away, np.inf), kind="stable")[: inside.sum()]]


@dataclass(frozen=True)
class KnownObjectsPruner(Pruner):
    """Keeps the first tokens of `order`. For one pass over the questions of `scenes`, in that order.

    Args:
        scenes: of the images to come.
        background: share of the budget that goes to the background.
    """

    scenes: Iterator[Scene]
    background: float = field(default=0.25, kw_only=True)
    positions: Positions = field(default="original", kw_only=True)

    def select(self, images: Sequence[VisualTokens], count: int | None) -> Tensor:
        """See `Pruner.select`."""
        number = int(count or 1)
        keep = torch.zeros(len(images), GRID * GRID, dtype=torch.bool)
        for mask, scene in zip(keep, self.scenes, strict=False):
            mask[order(scene, round(self.background * number))[:number]] = True
        return keep
