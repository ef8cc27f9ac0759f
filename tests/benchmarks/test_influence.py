"""The rank statistics of the influence benchmark, against counting every pair."""

from __future__ import annotations

from itertools import product

import numpy as np

from benchmarks.influence import auc, ranks, spearman


def test_ranks_share_ties() -> None:
    np.testing.assert_array_equal(ranks(np.array([[3.0, 1.0, 3.0, 0.0]])), [[2.5, 1.0, 2.5, 0.0]])


def test_spearman_is_the_correlation_of_ranks() -> None:
    a = np.array([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    b = np.array([[2.0, 4.0, 9.0, 10.0, 11.0], [5.0, 6.0, 7.0, 8.0, 1.0]])
    d = np.array([0, 4 * 1 + 16])  # sums of squared rank differences: 1 - 6 d / (n (n^2 - 1))
    np.testing.assert_allclose(spearman(a, b), 1 - 6 * d / (5 * 24))


def test_auc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, (3, 20)).astype(np.float64)  # with ties
    positive = rng.random((3, 20)) < 0.4
    for row, mask, found in zip(values, positive, auc(values, positive), strict=True):
        pairs = [(a > b) + (a == b) / 2 for a, b in product(row[mask], row[~mask])]
        assert found == np.mean(pairs)
