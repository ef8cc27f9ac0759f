"""Methods that put dropped tokens into kept ones."""

from __future__ import annotations

import greedy_oracle as by_hand
import pytest
import torch
from torch import Tensor

from codebook_prune import PoolPruner, UniformPruner, UserError
from codebook_prune.adapters.base import VisualTokens


def grid_of(rows: int, columns: int, seed: int = 0, d: int = 5) -> VisualTokens:
    vectors = torch.randn(rows * columns, d, generator=torch.Generator().manual_seed(seed))
    place = torch.arange(rows * columns)
    return VisualTokens(vectors, torch.zeros(rows * columns).long(), torch.stack([place // columns, place % columns], 1))


def merged(pruner: PoolPruner, tokens: VisualTokens) -> tuple[list[int], Tensor]:
    kept = pruner.keep_each([tokens], [None])[0]
    assert kept is not None
    assert kept.embeddings is not None
    return kept.mask.nonzero().squeeze(1).tolist(), kept.embeddings


def test_pooling_by_hand() -> None:
    """4 x 4 tokens to four cells are the four quarters; to three, the upper half and the two lower quarters."""
    tokens = grid_of(4, 4)
    quarters = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    kept, vectors = merged(PoolPruner(keep_tokens=4), tokens)
    assert kept == [0, 2, 8, 10]
    assert torch.allclose(vectors, torch.stack([tokens.embeddings[q].mean(0) for q in quarters]))
    kept, vectors = merged(PoolPruner(keep_tokens=3), tokens)
    assert kept == [1, 8, 10]
    assert torch.allclose(vectors[0], tokens.embeddings[:8].mean(0))
    assert torch.allclose(vectors[1:], torch.stack([tokens.embeddings[q].mean(0) for q in quarters[2:]]))


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (5, 7), (1, 9), (9, 2)])
def test_pooling_equals_the_loop_at_every_budget(rows: int, columns: int) -> None:
    tokens = grid_of(rows, columns)
    for keep in range(1, rows * columns):
        groups = by_hand.pooled(rows, columns, keep)
        assert sorted(i for cell in groups for i in cell) == list(range(rows * columns))  # every token in one cell
        assert len(groups) == keep == sum(map(bool, groups))
        expected = {by_hand.middle(cell, columns): tokens.embeddings[cell].mean(0) for cell in groups}
        kept, vectors = merged(PoolPruner(keep_tokens=keep), tokens)
        assert kept == sorted(expected)
        assert torch.allclose(vectors, torch.stack([expected[i] for i in kept]), atol=1e-6)


def test_a_grid_with_holes_is_refused() -> None:
    tokens = grid_of(4, 4)
    kept = UniformPruner(keep_tokens=12).keep(tokens)
    assert kept is not None
    with pytest.raises(UserError, match="first in the chain"):
        PoolPruner(keep_tokens=4).keep(tokens.only(kept))
