"""Ragged rows: packing what is kept to the right, and masks of a cache with new columns behind it. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(keep: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Where the kept columns of each row go: to the right end, in their own order, in as few columns as the longest row needs.

    Args:
        keep: [batch, length] bool.

    Returns:
        index [batch, longest] long, the column of `keep` that each new column takes; valid [batch, longest] bool, False where
        a shorter row is padded (with a column that is not kept, each at most once); whether all of them are valid.
    """
    lengths = keep.sum(1).tolist()
    longest = max(lengths)
    if min(lengths) == longest:
        index = keep.nonzero()[:, 1].view(len(keep), longest)
        return index, torch.ones_like(index, dtype=torch.bool), True
    index = torch.argsort(keep.byte(), dim=1, stable=True)[:, keep.shape[1] - longest :]
    return index, keep.gather(1, index), False


def gather_columns(values: Tensor, index: Tensor) -> Tensor:
    """Columns `index` [batch, new] of `values` [batch, length, d]."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def spread(values: Tensor, index: Tensor, valid: Tensor, length: int) -> Tensor:
    """Undo `packed`: [batch, length, d] with `values` [batch, new, d] at the columns they came from, zeros at all others."""
    index, valid = index.to(values.device), valid.to(values.device)
    values = values.masked_fill(~valid.unsqueeze(-1), 0)
    zeros = values.new_zeros(len(values), length, values.shape[-1])
    return zeros.scatter(1, index.unsqueeze(-1).expand_as(values), values)


def ignore_unpredicted(labels: Tensor, index: Tensor, valid: Tensor) -> None:
    """Set the labels [batch, length] to -100 (in place) whose predicting token, one column to the left, is not among the
    columns `index` [batch, new] that are `valid`: the loss passes over them."""
    left = torch.zeros(labels.shape, dtype=torch.bool, device=index.device).scatter_(1, index, valid)
    labels[:, 1:].masked_fill_(~left[:, :-1].to(labels.device), -100)


def join(past: Tensor | None, new: Tensor | None, rows: int, past_length: int, new_length: int) -> Tensor:
    """[rows, past_length + new_length] bool; a missing half is all True."""
    if not past_length and new is not None:
        return new
    device = next((half.device for half in (past, new) if half is not None), None)
    halves = ((past, past_length), (new, new_length))
    return torch.cat([torch.ones(rows, n, dtype=torch.bool, device=device) if h is None else h for h, n in halves], 1)
