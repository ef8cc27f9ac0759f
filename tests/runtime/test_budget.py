"""Budgets: which tokens stay, as pure functions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codebook_prune import UserError
from codebook_prune.budget import Budget, shares

scores_of = st.lists(st.integers(0, 5).map(lambda i: i / 4), min_size=1, max_size=40)


@given(scores_of, st.integers(1, 50), st.integers(1, 5))
def test_keep_tokens_keeps_the_lowest_scores_and_of_equal_ones_the_first(scores: list[float], k: int, least: int) -> None:
    k = max(k, least)
    mask = Budget(keep_tokens=k, min_keep=least).mask(torch.tensor(scores)).tolist()
    expected = set(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:k])
    assert {i for i, kept in enumerate(mask) if kept} == expected


@given(scores_of, st.integers(1, 1000), st.integers(1, 5))
def test_keep_ratio_rounds_half_up_in_decimals(scores: list[float], thousandths: int, least: int) -> None:
    n = len(scores)
    exact = math.floor(Fraction(thousandths, 1000) * n + Fraction(1, 2))
    wanted = min(n, max(least, exact))
    budget = Budget(keep_ratio=thousandths / 1000, min_keep=least)
    assert budget.count(n) == wanted == int(budget.mask(torch.tensor(scores)).sum())


@given(scores_of, st.integers(-1, 6).map(lambda i: i / 4), st.integers(1, 5))
def test_threshold_keeps_what_is_below_it_and_never_fewer_than_min_keep(scores: list[float], limit: float, least: int) -> None:
    mask = Budget(threshold=limit, min_keep=least).mask(torch.tensor(scores)).tolist()
    below = {i for i, score in enumerate(scores) if score < limit}
    first = set(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:least])
    assert {i for i, kept in enumerate(mask) if kept} == below | first


def test_the_float_just_below_a_half_still_rounds_up() -> None:
    assert 0.145 * 100 < 14.5
    assert Budget(keep_ratio=0.145).count(100) == 15


def test_nan_is_dropped_first() -> None:
    scores = torch.tensor([math.nan, 0.9, 0.1])
    assert Budget(keep_tokens=2).mask(scores).tolist() == [False, True, True]
    assert Budget(threshold=0.5).mask(scores).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no budget: give exactly one"),
        ({"keep_tokens": 3, "keep_ratio": 0.5}, "keep_tokens and keep_ratio contradict"),
        ({"keep_ratio": 0.5, "threshold": 0.5}, "keep_ratio and threshold contradict"),
        ({"keep_tokens": 0}, "whole number >= 1"),
        ({"keep_tokens": -4}, "whole number >= 1"),
        ({"keep_tokens": 2.5}, "whole number >= 1"),
        ({"keep_tokens": True}, "whole number >= 1"),
        ({"keep_tokens": ()}, "or a tuple of them"),
        ({"keep_tokens": (3, 0)}, "or a tuple of them"),
        ({"keep_tokens": 2, "min_keep": 3}, "less than min_keep"),
        ({"keep_tokens": (9, 2), "min_keep": 3}, "less than min_keep"),
        ({"keep_ratio": 0.0}, "in \\(0, 1\\]"),
        ({"keep_ratio": 1.01}, "in \\(0, 1\\]"),
        ({"keep_ratio": math.nan}, "finite"),
        ({"keep_ratio": "half"}, "finite number"),
        ({"threshold": math.inf}, "finite"),
        ({"keep_ratio": 0.5, "min_keep": 0}, "min_keep"),
    ],
)
def test_bad_budgets_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Budget(**fields)


def prompts(number: int, copies: int = 1) -> torch.Tensor:
    """Token ids of different prompts, each as often in a row."""
    return torch.arange(number).repeat_interleave(copies).unsqueeze(1)


def test_one_number_an_image() -> None:
    budget = Budget(keep_tokens=(5, 6, 7))
    assert budget.per_image([0, 0, 2], prompts(3)) == [5, 6, 7]
    assert budget.count(100, 6) == 6
    assert Budget(keep_ratio=0.5).per_image([0, 1], prompts(2)) == [None, None]
    with pytest.raises(UserError, match="say which image"):
        budget.count(100)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(1, 4))
def test_repeated_prompts_repeat_their_numbers(images: list[int], copies: int) -> None:
    numbers, rows, expected, following = [], [], [], 1
    for sample, count in enumerate(images):
        own = list(range(following, following + count))
        following += count
        numbers += own
        for copy in range(copies):
            rows += [sample * copies + copy] * count
            expected += own
    if numbers:
        assert Budget(keep_tokens=tuple(numbers)).per_image(rows, prompts(len(images), copies)) == expected


@pytest.mark.parametrize(("rows", "batch"), [([0, 1], 2), ([0, 0, 0, 1], 2), ([0, 0, 1, 2, 2, 2], 3), ([0] * 6, 2)])
def test_a_wrong_number_of_numbers_is_refused(rows: list[int], batch: int) -> None:
    with pytest.raises(UserError, match="3 numbers for"):
        Budget(keep_tokens=(5, 6, 7)).per_image(rows, torch.ones(batch, 4))


def test_numbers_of_half_the_prompts_are_no_numbers_of_beams() -> None:
    budget = Budget(keep_tokens=(2, 11))
    assert budget.per_image([0, 0, 1, 1], prompts(1, 2)) == [2, 11, 2, 11]
    with pytest.raises(UserError, match="2 numbers for 4 images"):
        budget.per_image([0, 0, 1, 1], prompts(2))


def test_frames_share_a_budget_in_proportion_and_the_largest_remainders_get_what_is_left() -> None:
    assert shares(10, [5, 5]) == [5, 5]
    assert shares(3, [4, 4]) == [2, 1]  # 1.5 each: the earlier one
    assert shares(7, [16, 30, 2]) == [2, 5, 0]  # 2.33, 4.375, 0.29: the largest remainder is the second's
    assert shares(1, [9] * 8) == [1, 0, 0, 0, 0, 0, 0, 0]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.data())
def test_shares_add_up_and_fit(lengths: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, sum(lengths)))
    found = shares(count, lengths)
    assert sum(found) == count
    for share, length in zip(found, lengths, strict=True):
        assert abs(share - count * length / sum(lengths)) < 1
        assert 0 <= share <= length
