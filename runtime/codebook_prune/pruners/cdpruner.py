"""The most probable subset of a process that wants relevance and diversity (CDPruner: Zhang et al., arXiv 2506.10967)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from codebook_prune.diversity import most_probable, unit_features
from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import VisualTokens
from codebook_schemas import UserError

TINY = 1e-6


@dataclass(frozen=True)
class CDPrunerPruner(Pruner):
    """Greedy MAP of a determinantal point process with the kernel r_i * cosine(i, j) * r_j, for every image, crop or frame.

    The paper takes the relevance r from CLIP's text tower. A loaded vision-language model has none, so here it is, as in
    OpenVINO's version, the mean cosine of a token to the input embeddings of all text tokens of its prompt (template
    included), scaled to (0, 1] over these (the published code scales over all crops together). The kept tokens depend on the
    question: prefix caches of the image are lost.

    Args:
        theta: None: r as it is (the paper). In [0, 1): exp(a * r) with a = theta / (2 - 2 * theta), which says how much
            relevance counts; 0 is diversity alone, OpenVINO takes 0.5.

    Raises:
        UserError: theta out of range.
    """

    sees_text: ClassVar[bool] = True
    theta: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None and not 0 <= self.theta < 1:
            raise UserError(f"theta must be in [0, 1), not {self.theta!r}")

    def select(self, images: Sequence[VisualTokens], count: int | None) -> Tensor:
        """See `Pruner.select`. Memory: n x (n + count) floats an image."""
        units = unit_features(torch.stack([tokens.embeddings for tokens in images]))
        asked = torch.stack([_direction(tokens) for tokens in images])
        relevance = (units @ asked.unsqueeze(2)).squeeze(2)
        low, high = relevance.aminmax(dim=1, keepdim=True)
        relevance = (relevance - low + TINY) / (high - low + TINY)
        if self.theta is not None:
            relevance = (relevance * self.theta / (2 - 2 * self.theta)).exp()
        wanted = units * relevance.unsqueeze(2)
        kernel = wanted @ wanted.mT
        kernel.diagonal(dim1=1, dim2=2).copy_(relevance.square())  # without rounding: equal relevance is a tie
        return most_probable(kernel, int(count or 1))


def _direction(tokens: VisualTokens) -> Tensor:
    """[d] float32: its product with a unit vector is that vector's mean cosine to the prompt's text tokens."""
    if tokens.text is None or not len(tokens.text):
        raise UserError("CDPruner ranks by the question: the prompt has no text")
    return F.normalize(tokens.text.float(), dim=-1).mean(0)
