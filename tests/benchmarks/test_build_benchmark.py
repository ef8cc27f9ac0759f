"""The build benchmark on a tiny model: every way finds the same tokens, for less and less work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_llava, tiny_processor

from benchmarks import build
from benchmarks.build import Case, compare
from benchmarks.selection import measure, rand_index
from codebook_builder.scores import ImageScores

CASE = Case("tiny", tiny_llava(), tiny_processor(), grid=16, probed=9, images=1, quantile=0.5)


def test_every_way_does_less() -> None:
    rows = compare(CASE)
    assert len(rows) == 5
    flops = [row["gflops_per_image"] for row in rows]
    assert flops == sorted(flops, reverse=True)
    assert len(set(flops)) == 4  # (a') and (b) are the same runs, apart or together
    assert rows[0]["ratio_to_naive"] == rows[1]["ratio_to_least_naive"] == 1.0
    assert 0 < rows[-1]["low_information"] < 0.5
    assert rows[-1]["ratio_to_least_naive"] > 1
    assert [row["experiments_skipped"] > 0 for row in rows] == [False] * 4 + [True]


def test_in_half_precision_agreement_is_reported_and_ways_may_be_left_out() -> None:
    model = tiny_llava().bfloat16()
    rows = compare(replace(CASE, model=model, without=(build.PUBLISHED,)))
    assert [row["variant"] for row in rows] == [row["variant"] for row in compare(CASE)][1:]
    assert all(row["ratio_to_naive"] is None for row in rows)
    assert rows[0]["agreement"] == 1.0
    assert all(0 < row["agreement"] <= 1 for row in rows)


def test_another_set_of_tokens_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    real = build.spend

    def wrong(way: build.Way, *rest: object) -> tuple[list[ImageScores], build.Spent]:
        (*scores, last), spent = real(way, *rest)  # type: ignore[arg-type]
        if isinstance(way, build.BatchedApart):
            last = replace(last, top1_prob=1 - last.top1_prob)
        return [*scores, last], spent

    monkeypatch.setattr(build, "spend", wrong)
    with pytest.raises(RuntimeError, match=r"scene-7: \(b\) batched, nothing shared disagrees"):
        compare(replace(CASE, images=9))


def test_rand_index_by_hand() -> None:
    a, b = np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0])
    assert rand_index(a, b) == 1.0
    # Pairs together in both: 0; expected 2 x 2 / 6; mean of both 2.
    assert rand_index(a, np.array([0, 1, 0, 1])) == pytest.approx((0 - 2 / 3) / (2 - 2 / 3))


def test_selection_is_measured() -> None:
    row = measure(300, 8, exact=True)
    assert (row["survivors"], row["d"]) == (300, 8)
    assert 0 < row["clustering_seconds"] <= row["seconds"]
    assert row["agreement"] == 1.0  # below the limit both are exact
