"""Evenly spaced tokens: the control that costs nothing and looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_prune.adapters.base import VisualTokens
from codebook_prune.pruners.base import Pruner

STEP = (0.7548776662466927, 0.5698402909980532)
"""1/g and 1/g^2 of the plastic number g = 1.3247..., the two-dimensional golden ratio."""


@dataclass(frozen=True)
class UniformPruner(Pruner):
    """Evenly spread over the image's grid, for any budget.

    The score is the fractional part of a linear function of (row, column) with the plastic number's steps (the R2 sequence,
    M. Roberts 2018): the k lowest of it are spread evenly whatever k is, like the threshold matrix of an ordered dither.
    A threshold of 0.25 keeps about a quarter.
    """

    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] float32 in [0, 1)."""
        place = tokens.position.float()
        return torch.frac(0.5 + place[:, 0] * STEP[0] + place[:, 1] * STEP[1])
