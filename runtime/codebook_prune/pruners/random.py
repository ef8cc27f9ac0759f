"""Random dropping: the control every method must beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import VisualTokens


@dataclass(frozen=True)
class RandomPruner(Pruner):
    """Redundancy drawn uniformly from [0, 1).

    Deterministic: the draw depends on `seed` and on the image's content, not on its place in the batch, so an image keeps the
    same tokens alone, in a batch, for every question and in every beam.
    """

    seed: int = field(default=0, kw_only=True)

    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] float32, drawn on the CPU so that every device gives the same."""
        generator = torch.Generator().manual_seed(content_seed(tokens.embeddings, self.seed))
        return torch.rand(len(tokens.embeddings), generator=generator).to(tokens.embeddings.device)


def content_seed(embeddings: Tensor, seed: int) -> int:
    """A seed from an image's tokens [n, d].

    Made from eight feature means in units of 1/64 of their spread: coarse enough that the rounding noise of another batch size
    almost never changes it, fine enough that two images almost never share it.
    """
    sample = embeddings[:, :8].detach().float()
    levels = (sample.mean(0) / sample.std(unbiased=False).clamp(min=1e-12) * 64).round().long()
    return int.from_bytes(hashlib.sha256(f"{seed}:{levels.tolist()}".encode()).digest()[:7], "big")
