"""Evenly spaced tokens: the control that costs nothing and looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import VisualTokens

BITS = 6


@dataclass(frozen=True)
class UniformPruner(Pruner):
    """Evenly spread over the image's grid, for any budget.

    The score is the threshold matrix of ordered dithering (Bayer 1973), 64 x 64, stretched over the grid: its k lowest cells
    are spread evenly whatever k is, and contain those of any smaller k. A threshold of 0.25 keeps a quarter.
    """

    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] float32 in [0, 1), from the tokens' places alone."""
        return dither(tokens.position)


def dither(places: Tensor) -> Tensor:
    """Rank in the threshold matrix of places [n, 2] (row, column) of one grid, divided by n: [n] float32 in [0, 1)."""
    rows, columns = ((places << BITS) // (places.amax(0) + 1)).unbind(1)
    order: Tensor = places.new_zeros(len(places))
    for bit in range(BITS):  # coarser halvings count less: the first tokens lie farthest apart
        row, column = rows >> bit & 1, columns >> bit & 1
        order = 4 * order + (2 * (row ^ column) + row)
    return order.argsort(stable=True).argsort().float() / len(places)
