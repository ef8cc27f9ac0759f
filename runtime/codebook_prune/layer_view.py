"""What a pruner inside the decoder sees of one call, and the ranking its answer is made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from codebook_prune.attention import Tap, last_row, last_valid, mean_of_visible_rows


@dataclass(frozen=True)
class LayerView:
    """The columns of one call that are alive at `layer`, a batch of ragged rows padded on either side.

    layer: the layer they are about to enter. depth: the decoder's layers. valid: [batch, length] bool, real columns. visual,
    text: [batch, length] bool, what may be dropped of either kind (never newlines between image rows). entered: [batch] long,
    the count of `visual` in front of layer 0. number: [batch, length] long, of each text column among its prompt's as they
    entered, from 0; -1 elsewhere. texts: [batch] long, how many those were. beside: [batch, length] bool, text that entered
    next to an image. seen: [batch, cached + length] bool, real columns, with the cache's. tap: queries and keys.
    """

    layer: int
    depth: int
    valid: Tensor
    visual: Tensor
    text: Tensor
    entered: Tensor
    number: Tensor
    texts: Tensor
    beside: Tensor
    seen: Tensor
    tap: Tap

    @cached_property
    def last_row(self) -> Tensor:
        """[batch, heads, length] float32: what the last prompt token attends to."""
        return last_row(self.tap, self.seen, self.valid)

    def mean_of_visible_rows(self, asking: Tensor) -> Tensor:
        """[batch, length] float32: largest attention over heads, mean over the queries `asking` [batch, length] that see it."""
        return mean_of_visible_rows(self.tap, self.seen, self.valid, asking)

    def span(self, start: int, end: int | None) -> Tensor:
        """[batch, length] bool: the text tokens of a prompt that a slice [start:end] of them, as they entered, holds."""
        total = self.texts.unsqueeze(1)
        low = total + start if start < 0 else start
        high = total if end is None else total + end if end < 0 else end
        return (self.number >= 0) & (self.number >= low) & (self.number < high)

    def first_columns(self) -> Tensor:
        """[batch, length] bool: the first valid column of each row."""
        return self.valid & (self.valid.cumsum(1) == 1)

    def last_columns(self, count: int) -> Tensor:
        """[batch, length] bool: the last `count` valid columns of each row."""
        return self.valid & (self.valid.flip(1).cumsum(1).flip(1) <= count)

    def without(self, dropped: Tensor) -> LayerView:
        """The view of the next pruner at the same layer: `dropped` [batch, length] are no longer candidates."""
        return replace(self, visual=self.visual & ~dropped, text=self.text & ~dropped)


def highest(scores: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """The `count` [batch] highest of each row's candidates.

    Args:
        scores: [batch, length] float; of equal scores the earlier column wins.
        candidates: [batch, length] bool.
        count: [batch] long, at most as many as there are candidates.

    Returns:
        [batch, length] bool.
    """
    order = scores.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return candidates & (rank < count.unsqueeze(1))


def last_column(valid: Tensor) -> Tensor:
    """[batch, length] bool: each row's last valid column, where the next token is predicted."""
    return torch.zeros_like(valid).scatter_(1, last_valid(valid), True)
