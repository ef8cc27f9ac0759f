"""Methods that choose tokens by what is already chosen: cases by hand, and plain loops (greedy_oracle.py)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import greedy_oracle as by_hand
import pytest
import torch
from codebook_folder import write_codebook
from conftest import tiny_llava
from oracle import inputs_of, prompt
from torch import Tensor

from codebook_prune import CDPrunerPruner, Codebook, CodebookDiversityPruner, DivPrunePruner, UserError
from codebook_prune.diversity import _together, cosine_distances, farthest_first
from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import VisualTokens

MODEL = tiny_llava()


def tokens_of(vectors: Tensor, text: Tensor | None = None) -> VisualTokens:
    place = torch.arange(len(vectors))
    return VisualTokens(vectors, torch.zeros(len(vectors)).long(), torch.stack([place // 6, place % 6], 1), text=text)


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


def codebook_of(folder: Path, prototypes: Tensor) -> Codebook:
    """A codebook that only the tests below are to be served by."""
    padded = torch.nn.functional.pad(prototypes, (0, 64 - prototypes.shape[1]))
    book = Codebook.from_pretrained(write_codebook(folder / "book", MODEL, padded))
    book.prototypes, book.manifest = prototypes, book.manifest.model_copy(update={"dimension": prototypes.shape[1]})
    return book


def test_codebook_diversity_by_hand(tmp_path: Path) -> None:
    """A prototype at 180 degrees. Redundancies (cosines): 0: -1, 10: -.985, 90: 0, 170: .985, 180: 1. The least redundant is
    at 0; weight times distance from it: 10: 1.985 * .015, 90: 1 * 1, 170: .015 * 1.985, 180: 0 * 2. So 90 is next; then
    10 with .030 is ahead of 170 with .015 * .826 = .013."""
    book, tokens = codebook_of(tmp_path, torch.tensor([[-3.0, 0.0]])), at_angles([0, 10, 90, 170, 180])
    plain = {"centered": False, "spread": 0}
    chosen = [kept(CodebookDiversityPruner(book, keep_tokens=k, strength=1, **plain), tokens) for k in (1, 2, 3, 4)]
    assert chosen == [[0], [0, 2], [0, 1, 2], [0, 1, 2, 3]]
    # full weight for the first of five, its square root with two kept: 10 comes to .021 and 170 to .122 * .826 = .101
    falling = [kept(CodebookDiversityPruner(book, keep_tokens=k, strength=0.2, **plain), tokens) for k in (2, 3)]
    assert falling == [[0, 2], [0, 2, 3]]
    # diversity alone: from 0 the farthest is 180, then 90
    alone = [kept(CodebookDiversityPruner(book, keep_tokens=k, strength=0, **plain), tokens) for k in (2, 3)]
    assert alone == [[0, 4], [0, 2, 4]]
    # what the codebook recognises goes first (90 to 180), and is all that is left for the last two, the least redundant first
    removing = [kept(CodebookDiversityPruner(book, keep_tokens=k, remove_above=-0.5, **plain), tokens) for k in (2, 3, 4)]
    assert removing == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_equal_tokens_far_apart_are_kept_before_near_ones(tmp_path: Path) -> None:
    """Three in a row show the same, a fourth something else: by embeddings alone 1 (the first of equals) follows 0 and 3;
    with the distance in the picture the twin farthest from both does."""
    vectors = torch.eye(9)[[0, 0, 0, 1]]
    cells = torch.tensor([[0, 0], [0, 1], [0, 5], [3, 0]])
    tokens = VisualTokens(vectors, torch.zeros(4).long(), cells)
    book = codebook_of(tmp_path, -torch.eye(9)[:1])
    assert kept(CodebookDiversityPruner(book, keep_tokens=3, spread=0), tokens) == [0, 1, 3]
    assert kept(CodebookDiversityPruner(book, keep_tokens=3, spread=0.8), tokens) == [0, 2, 3]


@pytest.mark.parametrize("keep", [1, 11, 29])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"strength": 1.0},
        {"strength": 0.3},
        {"spread": 0},
        {"spread": 3.0},
        {"strength": 0, "centered": False},
        {"top_k": 1},
        {"top_k": 6},
        {"remove_above": 0.3},
        {"remove_above": -1},
    ],
)
def test_codebook_diversity_equals_the_loop(fields: dict[str, Any], keep: int, tmp_path: Path) -> None:
    for seed in range(2):
        vectors, prototypes = noise(30, seed), noise(5, seed + 10)
        pruner = CodebookDiversityPruner(codebook_of(tmp_path / str(seed), prototypes), keep_tokens=keep, **fields)
        options = {"centring" if key == "centered" else key: value for key, value in fields.items()}
        tokens = tokens_of(vectors)
        cells = [(int(row), int(column)) for row, column in tokens.position]
        expected = by_hand.codebook_diversity(vectors.double().tolist(), prototypes.double().tolist(), keep, cells, **options)
        assert kept(pruner, tokens) == sorted(expected)


def test_cdpruner_by_hand() -> None:
    """Tokens 0 and 1 are the same direction, 2, 3, 4 are at right angles to all others. The text looks at 0.8, 0.8, 0.5, 0.3, 0
    of them: the first and its twin are the most relevant, but the twin adds no volume."""
    vectors = torch.eye(5)[[0, 0, 1, 2, 3]] * torch.tensor([[1.0], [9], [2], [3], [4]])
    text = 7 * torch.tensor([[0.8, 0.5, 0.3, 0, 0.14**0.5]])
    tokens = tokens_of(vectors, torch.cat([text, text]))
    assert [kept(CDPrunerPruner(keep_tokens=k), tokens) for k in (1, 2, 3)] == [[0], [0, 2], [0, 2, 3]]
    other = tokens_of(vectors, torch.tensor([[0.0, 0, 0, 1, 0]]))
    assert kept(CDPrunerPruner(keep_tokens=1), other) == [4]  # another question, another token
    assert kept(CDPrunerPruner(keep_tokens=4, theta=0), other) == [0, 2, 3, 4]  # no question at all
    with pytest.raises(UserError, match="no text"):
        kept(CDPrunerPruner(keep_tokens=1), tokens_of(vectors))


@pytest.mark.parametrize("theta", [None, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("keep", [1, 2, 8, 11])
def test_cdpruner_equals_the_determinants(keep: int, theta: float | None) -> None:
    for seed in range(2):
        vectors, text = noise(12, seed, 20), noise(3, seed + 10, 20)
        expected = by_hand.cdpruner(vectors.double().tolist(), text.double().tolist(), keep, theta)
        assert kept(CDPrunerPruner(keep_tokens=keep, theta=theta), tokens_of(vectors, text)) == sorted(expected)


def test_twins_beyond_the_rank_still_fill_the_budget() -> None:
    tokens = tokens_of(torch.eye(3).repeat(4, 1), torch.ones(2, 3))
    assert [len(kept(CDPrunerPruner(keep_tokens=k, theta=0.5), tokens)) for k in (3, 4, 11)] == [3, 4, 11]
    assert kept(CDPrunerPruner(keep_tokens=3, theta=0.5), tokens) == [0, 1, 2]


@pytest.mark.parametrize("count", [12, 60, 119])
def test_budgets_far_beyond_the_rank_are_filled(count: int) -> None:
    """Real images: 120 tokens that nearly lie in a space of 10; what rounding leaves of a gain must not be divided by."""
    vectors = noise(120, 1, 10) @ noise(10, 2, 64) + 1e-3 * noise(120, 3, 64)
    for theta in (None, 0.5):
        assert len(kept(CDPrunerPruner(keep_tokens=count, theta=theta), tokens_of(vectors, noise(4, 5, 64)))) == count


@torch.no_grad()
def test_a_pruner_that_asks_sees_the_text_of_its_own_row() -> None:
    prompts, seen = [prompt(0, 0), prompt(1, 1), prompt(2, 2)], []

    class Reader(CDPrunerPruner):
        def select(self, images: Sequence[VisualTokens], count: int | None) -> Tensor:
            seen.extend(tokens.text for tokens in images)
            return super().select(images, count)

    with Reader(keep_tokens=3)(MODEL):
        MODEL(**inputs_of(prompts))
    for p, text in zip([prompts[1], prompts[2], prompts[2]], seen, strict=True):
        ids = inputs_of([p])["input_ids"][0]
        assert torch.equal(text, MODEL.get_input_embeddings()(ids[ids != MODEL.config.image_token_id]))


def test_images_chosen_from_together_are_as_alone(tmp_path: Path) -> None:
    images = [tokens_of(noise(20, seed), noise(seed + 1, 30)) for seed in range(4)]
    book = codebook_of(tmp_path, noise(3, 9))
    for pruner in (
        DivPrunePruner(keep_tokens=7),
        DivPrunePruner(keep_tokens=7, centered=True),
        CodebookDiversityPruner(book, keep_tokens=7),
        CodebookDiversityPruner(book, keep_tokens=7, remove_above=0.2, top_k=2),
        CDPrunerPruner(keep_tokens=7),
    ):
        together = pruner.select(images, 7)
        assert [mask.nonzero().squeeze(1).tolist() for mask in together] == [kept(pruner, tokens) for tokens in images]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_the_steps_on_a_device_are_those_on_the_cpu(count: int, weighted: bool) -> None:
    distances = cosine_distances(torch.stack([noise(20, seed) for seed in range(3)]))
    weights = torch.rand(3, count - 1, 20, generator=torch.Generator().manual_seed(0)).add_(0.1) if weighted else None
    first = torch.tensor([4, 0, 19])
    expected = farthest_first(distances.clone(), first, count, weights)
    distances.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    assert torch.equal(_together(distances, first, count, weights), expected)
    assert expected.sum(1).tolist() == [count] * 3


def test_a_larger_budget_keeps_what_a_smaller_one_kept(tmp_path: Path) -> None:
    book, tokens = codebook_of(tmp_path, noise(5, 1)), tokens_of(noise(30, 2))
    masks = [set(kept(CodebookDiversityPruner(book, keep_tokens=k), tokens)) for k in range(1, 30)]
    assert all(fewer < more for fewer, more in pairwise(masks))


def test_a_threshold_needs_scores() -> None:
    with pytest.raises(UserError, match="DivPrunePruner has no score"):
        DivPrunePruner(threshold=0.5)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("has no score", {"threshold": 0.5}), ("remove_above is a cosine", {"remove_above": float("nan")}),
        ("strength must be", {"strength": -1.0}), ("spread must be", {"spread": float("inf")}),
        ("top_k must be at least 1", {"top_k": 0}),
    ],
)  # fmt: skip
def test_bad_fields_are_refused(message: str, fields: dict[str, Any], tmp_path: Path) -> None:
    budget = {} if "threshold" in fields else {"keep_tokens": 3}
    with pytest.raises(UserError, match=message):
        CodebookDiversityPruner(codebook_of(tmp_path, noise(5, 0)), **budget, **fields)


@pytest.mark.parametrize("theta", [-0.1, 1.0])
def test_theta_out_of_range_is_refused(theta: float) -> None:
    with pytest.raises(UserError, match="theta must be"):
        CDPrunerPruner(keep_tokens=3, theta=theta)


@torch.no_grad()
def test_a_codebook_of_another_model_is_refused_on_entering(tmp_path: Path) -> None:
    book = Codebook.from_pretrained(write_codebook(tmp_path / "book", MODEL, torch.randn(7, 64)))
    with pytest.raises(UserError, match="build a codebook"), CodebookDiversityPruner(book, keep_tokens=3)(tiny_llava(seed=5)):
        pass
