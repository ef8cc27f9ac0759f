"""Methods that choose tokens by what is already chosen: cases by hand, and plain loops (greedy_oracle.py)."""

from __future__ import annotations

import greedy_oracle as by_hand
import pytest
import torch
from torch import Tensor

from codebook_prune import DivPrunePruner, UserError
from codebook_prune.adapters.base import VisualTokens
from codebook_prune.diversity import _together, cosine_distances, farthest_first, unit_features
from codebook_prune.pruners.base import Pruner


def tokens_of(vectors: Tensor) -> VisualTokens:
    place = torch.arange(len(vectors))
    return VisualTokens(vectors, torch.zeros(len(vectors)).long(), torch.stack([place // 6, place % 6], 1))


def at_angles(degrees: list[float]) -> VisualTokens:
    """Unit vectors in a plane, of different lengths: only directions may matter."""
    angle = torch.tensor(degrees).deg2rad()
    return tokens_of(torch.stack([angle.cos(), angle.sin()], 1) * (1 + torch.arange(len(degrees))).unsqueeze(1))


def kept(pruner: Pruner, tokens: VisualTokens) -> list[int]:
    mask = pruner.keep(tokens)
    assert mask is not None
    return mask.nonzero().squeeze(1).tolist()


def noise(n: int, seed: int, d: int = 9) -> Tensor:
    """Not centred: a common direction, as real embeddings have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) + 2 * torch.randn(1, d, generator=generator)


def test_divprune_by_hand() -> None:
    """Nearest others: 0 and 5 degrees: 5; 40: 35; 90: 20; 110: 20. So 40 first; 110 is 70 away from it, 0 only 40; then 0."""
    tokens = at_angles([0, 5, 40, 90, 110])
    assert [kept(DivPrunePruner(keep_tokens=k), tokens) for k in (1, 2, 3, 4)] == [[2], [2, 4], [0, 2, 4], [0, 2, 3, 4]]


def test_of_equally_far_tokens_the_first_is_chosen() -> None:
    tokens = tokens_of(torch.eye(6))
    assert kept(DivPrunePruner(keep_tokens=3), tokens) == [0, 1, 2]
    twins = tokens_of(torch.eye(3).repeat(2, 1))
    assert kept(DivPrunePruner(keep_tokens=3), twins) == [0, 1, 2]
    assert kept(DivPrunePruner(keep_tokens=5), twins) == [0, 1, 2, 3, 4]


def test_centering_takes_away_what_all_tokens_share() -> None:
    spread = torch.tensor([[4, 0], [0, 0.1], [-4, 0], [0, -0.1], [4, 0.5], [-4, -0.5]])  # their mean is 0
    shared, alone = tokens_of(torch.cat([spread, torch.full((6, 1), 50.0)], 1)), tokens_of(spread)
    assert kept(DivPrunePruner(keep_tokens=4, centered=True), shared) == kept(DivPrunePruner(keep_tokens=4), alone)
    assert {0, 1, 2, 3} == set(kept(DivPrunePruner(keep_tokens=4), alone)) != set(kept(DivPrunePruner(keep_tokens=4), shared))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("n", "keep"), [(30, 1), (30, 2), (30, 13), (30, 29), (2, 1)])
def test_divprune_equals_the_loop(n: int, keep: int, centered: bool) -> None:
    for seed in range(3):
        vectors = noise(n, seed)
        rows = vectors.double().tolist()
        expected = by_hand.divprune(by_hand.centered(rows) if centered else rows, keep)
        assert kept(DivPrunePruner(keep_tokens=keep, centered=centered), tokens_of(vectors)) == sorted(expected)


def test_images_chosen_from_together_are_as_alone() -> None:
    images = [tokens_of(noise(20, seed)) for seed in range(4)]
    for pruner in (DivPrunePruner(keep_tokens=7), DivPrunePruner(keep_tokens=7, centered=True)):
        together = pruner.select(images, 7)
        assert [mask.nonzero().squeeze(1).tolist() for mask in together] == [kept(pruner, tokens) for tokens in images]


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_the_steps_on_a_device_are_those_on_the_cpu(count: int) -> None:
    distances = cosine_distances(unit_features([tokens_of(noise(20, seed)) for seed in range(3)]))
    first = torch.tensor([4, 0, 19])
    expected = farthest_first(distances.clone(), first, count)
    distances.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    assert torch.equal(_together(distances, first, count), expected)
    assert expected.sum(1).tolist() == [count] * 3


def test_a_threshold_needs_scores() -> None:
    with pytest.raises(UserError, match="DivPrunePruner has no score"):
        DivPrunePruner(threshold=0.5)
