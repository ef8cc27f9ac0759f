"""Dominant tokens by the encoder's attention, the rest merged into a few others (VisionZip: Yang et al., arXiv 2412.04467)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import EncoderView, VisualTokens
from codebook_schemas import UserError


@dataclass(frozen=True)
class VisionZipPruner(Pruner):
    """Works at the encoder's feature layer, before the connector; the question plays no part. LLaVA-1.5 type models only.

    Dominant tokens are those that [CLS] attends to most, and [CLS] itself (without a [CLS]: those that get most attention from
    all tokens). Of the others, evenly spaced ones become contextual: to each is added the mean of the dropped tokens whose key,
    averaged over heads, is most similar to its own. Kept tokens stay in raster order, as the paper has it for crops (its code
    for LLaVA-1.5 puts contextual tokens last). [CLS] comes first and takes up the first place that is free.

    Args:
        contextual: share of the budget for contextual tokens, rounded half up; the paper's 10 of 64, 20 of 128, 30 of 192.
        with_cls: whether [CLS] is one of the dominant tokens.

    Raises:
        UserError: contextual out of range; on entering a block, a family whose encoder cannot be read.
    """

    sees_encoder: ClassVar[bool] = True
    contextual: float = field(default=5 / 32, kw_only=True)
    with_cls: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual <= 1:
            raise UserError(f"contextual is a share of the budget, in [0, 1], not {self.contextual!r}")

    def select(self, images: Sequence[VisualTokens], count: int | None) -> Tensor:
        """See `Pruner.select`."""
        masks = [torch.zeros(len(tokens.embeddings), dtype=torch.bool, device=tokens.embeddings.device) for tokens in images]
        for mask, tokens in zip(masks, images, strict=True):
            view = _encoder(tokens)
            dominant, targets, _ = self._split(view, int(count or 1))
            mask[dominant] = mask[targets] = True
            if self.with_cls and view.cls is not None:
                mask[mask.byte().argmin()] = True
        return torch.stack(masks)

    def merge(self, images: Sequence[VisualTokens], kept: Tensor) -> Tensor:
        """See `Pruner.merge`."""
        count = int(kept[0].sum())
        return torch.stack([self._merged(_encoder(tokens), count) for tokens in images])

    def _merged(self, view: EncoderView, count: int) -> Tensor:
        """[count, d]: what enters the LLM of one image."""
        dominant, targets, others = self._split(view, count)
        hidden = view.hidden.float()
        if len(targets):
            similarity = F.normalize(view.keys[others], dim=-1) @ F.normalize(view.keys[targets], dim=-1).T
            nearest = targets[similarity.argmax(1)]
            total = torch.zeros_like(hidden).index_add_(0, nearest, hidden[others])
            hidden = hidden + total / nearest.bincount(minlength=len(hidden)).clamp(min=1).unsqueeze(1)
        vectors = hidden[torch.cat([dominant, targets]).sort().values].to(view.hidden.dtype)
        if self.with_cls and view.cls is not None:
            vectors = torch.cat([view.cls.unsqueeze(0), vectors])
        return view.project(vectors)

    def _split(self, view: EncoderView, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Places of dominant tokens, of contextual ones, and of those that are merged into these."""
        budget = count - (self.with_cls and view.cls is not None)
        contextual = min(int(self.contextual * count + 0.5), budget)
        order = view.attention.argsort(descending=True, stable=True)
        rest = order[budget - contextual :].sort().values
        target = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
        target[torch.arange(contextual, device=rest.device) * (len(rest) // max(1, contextual))] = True
        return order[: budget - contextual], rest[target], rest[~target]


def _encoder(tokens: VisualTokens) -> EncoderView:
    if tokens.encoder is None:
        raise UserError("VisionZipPruner looks into the vision encoder: prune a model with it, not single tokens")
    return tokens.encoder
