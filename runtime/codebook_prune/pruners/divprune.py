"""The most diverse subset, nothing else (DivPrune: Alvar et al., arXiv 2503.02175, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from codebook_prune.diversity import cosine_distances, farthest_first
from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import VisualTokens


@dataclass(frozen=True)
class DivPrunePruner(Pruner):
    """Greedy max-min of 1 - cosine between the embeddings that enter the LLM: no scores, no question, no prototypes.

    First the token whose nearest other token is farthest, then always the one whose nearest chosen token is farthest. Each
    image, each crop of one and each frame of a video is chosen from by itself, newlines left out (the published code chooses
    over all crops and newlines together). `centered=True` compares the tokens after subtracting their mean, which is half of
    what Cen-Prune adds to DivPrune (its other half, a weight by distinctiveness, is not here).
    """

    centered: bool = field(default=False, kw_only=True)

    def select(self, images: Sequence[VisualTokens], count: int | None) -> Tensor:
        """See `Pruner.select`. Memory: n x n floats an image."""
        distances = cosine_distances(torch.stack([tokens.embeddings for tokens in images]), self.centered)
        distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        return farthest_first(distances, distances.amin(2).argmax(1), int(count or 1))
