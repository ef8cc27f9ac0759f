"""What repeats the frame before at the same place (EVS: Bagrov et al., arXiv 2510.14624)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from codebook_prune.budget import lowest
from codebook_prune.pruners.base import Pruner
from codebook_prune.pruners.uniform import dither
from codebook_prune.visual_tokens import Kept, VisualTokens


@dataclass(frozen=True)
class EVSPruner(Pruner):
    """Redundancy = cosine of a token to the token at its place in the frame before: what stands still goes first.

    The paper compares pixels; its versions in serving engines, as this one, compare embeddings. A `threshold` compares with the
    last frame in which the place was kept, so that slow changes add up. A token whose place was not seen before (all of the
    first frame) counts as new: those stay before all others, evenly spread where the budget is below their number.

    A video's budget is ranked over all of its frames. Images that follow each other in a prompt are taken for frames too: their
    budgets (but not a tuple of them) are ranked together, so that one image may keep fewer tokens than another.
    """

    by_prompt: ClassVar[bool] = True

    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] float32 of one image or video: in [-2, -1) for tokens without one before them, else their cosine."""
        return self._repetition([tokens])

    def keep_each(self, items: Sequence[VisualTokens], limits: Sequence[int | None]) -> list[Kept | None]:
        """See `Pruner.keep_each`; `items` are those of one prompt."""
        found: list[Kept | None] = []
        while len(found) < len(items):
            start = len(found)
            end = start + 1
            while not items[start].is_video and end < len(items) and not items[end].is_video:
                end += 1
            found += self._keep_sequence(items[start:end], limits[start:end])
        return found

    def _keep_sequence(self, items: Sequence[VisualTokens], limits: Sequence[int | None]) -> list[Kept | None]:
        """What stays of one video, or of images that follow each other."""
        lengths = [len(tokens.embeddings) for tokens in items]
        counts = [self.budget.count(n, limit) for n, limit in zip(lengths, limits, strict=True)]
        if counts == lengths:
            return [None] * len(items)
        parts = torch.split(self._repetition(items), lengths)
        if self.threshold is not None or any(limit is not None for limit in limits):
            return [Kept(self.budget.mask(scores, limit)) for scores, limit in zip(parts, limits, strict=True)]
        certain = torch.cat([lowest(scores, min(self.min_keep, len(scores))) for scores in parts])
        ranked = torch.cat(parts).masked_fill(certain, -torch.inf)
        mask = lowest(ranked, sum(count or 0 for count in counts))
        return [Kept(part) for part in torch.split(mask, lengths)]

    def _repetition(self, items: Sequence[VisualTokens]) -> Tensor:
        """`score` of all tokens of a sequence [n]: of one video frame by frame, of images one after the other."""
        lengths = [len(tokens.embeddings) for tokens in items]
        units = F.normalize(torch.cat([tokens.embeddings for tokens in items]).float(), dim=-1)
        scores = torch.cat([dither(tokens.position) for tokens in items]) - 2
        place = _numbered(torch.cat([_places(tokens) for tokens in items]))
        if items[0].is_video and items[0].frame is not None:
            lengths = torch.unique_consecutive(items[0].frame, return_counts=True)[1].tolist()
        latest = torch.full((int(place.max()) + 1,), -1, device=place.device)
        for now in torch.split(torch.arange(len(place), device=place.device), lengths):
            before = latest[place[now]]
            cosine = (units[now] * units[before]).sum(-1)
            scores[now] = torch.where(before >= 0, cosine, scores[now])
            shown = now if self.threshold is None else now[scores[now] < self.threshold]
            latest[place[shown]] = shown
        return scores


def _places(tokens: VisualTokens) -> Tensor:
    """(crop, row, column) [n, 3]; the frames of a video share their places."""
    crop = torch.zeros_like(tokens.position[:, 0]) if tokens.is_video or tokens.frame is None else tokens.frame
    return torch.cat([crop.unsqueeze(1), tokens.position], 1)


def _numbered(places: Tensor) -> Tensor:
    """One number [n] for each of the places [n, 3]."""
    _, rows, columns = (places.amax(0) + 1).tolist()
    crop, row, column = places.unbind(1)
    number: Tensor = (crop * rows + row) * columns + column
    return number
