"""A coarser grid: neighbouring tokens averaged. The control that every choice of tokens has to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import VisualTokens
from codebook_schemas import UserError


@dataclass(frozen=True)
class PoolPruner(Pruner):
    """Average pooling of the token grid to exactly the budget: the mean of every cell enters in place of its central token.

    The grid is cut into horizontal bands and these into cells, as equal as whole tokens allow, so any budget gives a grid of
    about the image's shape. What is pooled are tokens that have seen the whole image at full resolution; giving the encoder a
    smaller image is another control, and none of a pruner (`benchmarks/downsample.py`).

    Raises:
        UserError: inside a block, behind a pruner that left holes in the grid.
    """

    def select(self, images: Sequence[VisualTokens], count: int | None) -> Tensor:
        """See `Pruner.select`: the token nearest to the middle of every cell, the first of equally near ones."""
        masks = [torch.zeros(len(tokens.position), dtype=torch.bool, device=tokens.position.device) for tokens in images]
        for mask, tokens in zip(masks, images, strict=True):
            cell, place = cells(tokens.position, int(count or 1)), tokens.position.double()
            away = (place - _means(place, cell)[cell]).square().sum(1)
            order = torch.argsort(cell + away / (away.max() + 1), stable=True)
            first = torch.ones_like(order, dtype=torch.bool)
            first[1:] = cell[order][1:] != cell[order][:-1]
            mask[order[first]] = True
        return torch.stack(masks)

    def merge(self, images: Sequence[VisualTokens], kept: Tensor) -> Tensor:
        """See `Pruner.merge`; means are taken in float32."""
        pooled = []
        for tokens, mask in zip(images, kept, strict=True):
            cell = cells(tokens.position, int(mask.sum()))
            pooled.append(_means(tokens.embeddings.float(), cell)[cell[mask]].to(tokens.embeddings.dtype))
        return torch.stack(pooled)


def cells(position: Tensor, count: int) -> Tensor:
    """Which of `count` cells each token of a whole grid belongs to: [n] long, every cell taken, numbered in raster order.

    Args:
        position: [n, 2] long, (row, column) of every cell of the grid.
        count: 1 to n.

    Raises:
        UserError: the grid has holes.
    """
    rows, columns = (position.amax(0) + 1).tolist()
    if rows * columns != len(position):
        raise UserError("PoolPruner averages a whole grid of tokens: put it first in the chain")
    bands = min(max(round(math.sqrt(count * rows / columns)), -(-count // columns)), rows, count)
    start = torch.arange(bands + 1, device=position.device) * count // bands
    row, column = position.unbind(1)
    band = row * bands // rows
    cell: Tensor = start[band] + column * (start[band + 1] - start[band]) // columns
    return cell


def _means(values: Tensor, cell: Tensor) -> Tensor:
    """Mean of the rows of `values` [n, d] that share a cell: [cells, d]."""
    total = values.new_zeros(int(cell.max()) + 1, values.shape[1]).index_add_(0, cell, values)
    return total / cell.bincount().unsqueeze(1)
