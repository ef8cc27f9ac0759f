"""Redundancy by codebook, then diversity: this project's own method, on the codebook of arXiv 2503.20540."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.codebook import Codebook
from codebook_prune.diversity import cosine_distances, farthest_first, grid_distances
from codebook_prune.pruners.base import Positions, Pruner
from codebook_prune.visual_tokens import VisualTokens
from codebook_schemas import UserError

LEAST_WEIGHT = 1e-6
"""Of a token that equals a prototype: its cosine is 1 but for rounding."""


@dataclass(frozen=True)
class CodebookDiversityPruner(Pruner):
    """The budget is filled with tokens that differ from each other; the codebook holds back those it recognises.

    Ranking by redundancy alone keeps near-duplicates and loses coverage. Here the least redundant token is kept first, then
    always the one with the largest (1 - redundancy) ** exponent * its distance to the nearest kept token: greedy max-min
    (k-center). The exponent is min(1, strength / the share of the image's tokens kept so far): what is redundant comes last
    while few are kept, and coverage decides later. The distance is 1 - cosine of the embeddings, centred on their image's
    mean, plus `spread` times the distance in the picture, so that equal objects in different places are all kept. There is
    one order of an image's tokens: a larger budget keeps what a smaller one kept. No question and no attention: the same
    image keeps the same tokens for every question. Memory, an image: n x n floats for distances, n for every token kept, beside
    tokens x prototypes.

    Args:
        codebook: of this model.
        remove_above: tokens with a redundancy above this are kept only when nothing else is left, the least redundant
            first. None: the weight alone holds them back.
        strength: the share of tokens kept up to which redundancy weighs fully; 0 is diversity alone, started at the least
            redundant token; 1 weighs fully throughout.
        spread: weight of the distance in the picture, whose longer side is 1; 0 is the embeddings alone.
        top_k: redundancy is the mean of this many largest cosines to prototypes (of all, where the codebook has fewer).
        centered: subtract the mean of an image's embeddings before they are compared with each other.
        positions: "original" by default: every method lost less with it where that was measured (docs/accuracy.md).

    Raises:
        UserError: fields out of range; on entering a block, a codebook of another model.
    """

    codebook: Codebook
    remove_above: float | None = field(default=None, kw_only=True)
    strength: float = field(default=0.02, kw_only=True)
    spread: float = field(default=0.8, kw_only=True)
    top_k: int = field(default=4, kw_only=True)
    centered: bool = field(default=True, kw_only=True)
    positions: Positions = field(default="original", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_above is not None and not math.isfinite(self.remove_above):
            raise UserError(f"remove_above is a cosine, not {self.remove_above!r}")
        for name in ("strength", "spread"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UserError(f"{name} must be a finite number >= 0, not {value!r}")
        if self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k!r}")

    def check(self, adapter: VLMAdapter) -> None:
        """Refuse a model the codebook was not built from."""
        self.codebook.check_model(adapter)

    def select(self, images: Sequence[VisualTokens], count: int | None) -> Tensor:
        """See `Pruner.select`."""
        kept = int(count or 1)
        vectors = torch.stack([tokens.embeddings for tokens in images])
        redundancy = self.codebook.similarity(vectors.flatten(0, 1), self.top_k).view(len(images), -1)
        distances = cosine_distances(vectors, self.centered)
        if self.spread:
            distances += self.spread * grid_distances(torch.stack([tokens.position for tokens in images]))
        logarithm = (1 - redundancy).clamp_(min=LEAST_WEIGHT).log_()
        if self.remove_above is not None:  # below every distance, the more redundant the lower
            recognised = redundancy > self.remove_above
            distances = torch.where(recognised.unsqueeze(1), (-2 - redundancy).unsqueeze(1), distances)
            logarithm.masked_fill_(recognised, 0)
        weights = self._weights(logarithm, kept) if self.strength else None
        return farthest_first(distances, redundancy.argmin(1), kept, weights)

    def _weights(self, logarithm: Tensor, kept: int) -> Tensor:
        """(1 - redundancy) ** exponent of every step behind the first: [images, kept - 1, n], from log(1 - redundancy)."""
        steps = torch.arange(1, kept, device=logarithm.device).view(-1, 1)
        exponents = (self.strength * logarithm.shape[1] / steps).clamp_(max=1)
        return (exponents * logarithm.unsqueeze(1)).exp_()
