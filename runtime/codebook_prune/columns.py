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
    lengths = keep.sum(1)
    shortest, longest = torch.stack([lengths.min(), lengths.max()]).tolist()
    index = torch.argsort(keep.byte(), dim=1, stable=True)[:, keep.shape[1] - longest :]
    return index, keep.gather(1, index), shortest == longest


def gather_columns(values: Tensor, index: Tensor) -> Tensor:
    """Columns `index` [batch, new] of `values` [batch, length, d]."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def join(past: Tensor | None, new: Tensor | None, rows: int, past_length: int, new_length: int) -> Tensor:
    """[rows, past_length + new_length] bool; a missing half is all True."""
    device = next((half.device for half in (past, new) if half is not None), None)
    halves = ((past, past_length), (new, new_length))
    return torch.cat([torch.ones(rows, n, dtype=torch.bool, device=device) if h is None else h for h, n in halves], 1)
