"""DPC-KNN against a direct implementation with loops, and its approximation against itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from codebook_builder import clustering
from codebook_builder.clustering import dpc_knn
from codebook_builder.faiss_ops import kmeans, knn_squared


def direct(points: np.ndarray, clusters: int, neighbours: int) -> list[int]:
    """Every definition written out over pairs."""
    n, d = points.shape
    distance = [[math.dist(a.tolist(), b.tolist()) / math.sqrt(d) for b in points] for a in points]
    rho = []
    for i in range(n):
        others = sorted(distance[i][j] for j in range(n) if j != i)[:neighbours]
        rho.append(math.exp(-sum(x * x for x in others) / len(others)) if others else 1.0)
    delta = []
    for i in range(n):
        denser = [distance[i][j] for j in range(n) if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        delta.append(min(denser) if denser else max(distance[i]))
    centres = sorted(range(n), key=lambda i: (-rho[i] * delta[i], i))[:clusters]
    labels = []
    for i in range(n):
        nearest = min(sorted(centres), key=lambda c: distance[i][c])
        labels.append(centres.index(i if i in centres else nearest))
    return labels


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("clusters", "neighbours"), [(1, 1), (4, 5), (8, 3), (50, 5)])
def test_equals_the_direct_implementation(seed: int, clusters: int, neighbours: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(4, 7)) * 3
    points = (centres[rng.integers(0, 4, 40)] + rng.normal(size=(40, 7))).astype(np.float32)
    assert dpc_knn(points, clusters, neighbours, 100).tolist() == direct(points, clusters, neighbours)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(0).normal(size=(57, 5)).astype(np.float32)
    whole = dpc_knn(points, 6, 5, 100)
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 57 * 10)
    assert (dpc_knn(points, 6, 5, 100) == whole).all()


def test_ties_go_to_the_lower_index() -> None:
    # A square lattice of integers: exact distances, many equal densities.
    points = np.array([[x, y] for x in range(4) for y in range(4)], np.float32)
    assert dpc_knn(points, 3, 2, 100).tolist() == direct(points, 3, 2)
    same = np.ones((5, 3), np.float32)
    assert dpc_knn(same, 2, 2, 100).tolist() == [0, 1, 0, 0, 0]


def test_small_and_far() -> None:
    assert dpc_knn(np.empty((0, 3), np.float32), 2, 2, 10).tolist() == []
    assert dpc_knn(np.ones((1, 3), np.float32), 2, 2, 10).tolist() == [0]
    far = np.array([[0.0], [100.0], [1000.0], [1100.0]], np.float32)  # densities underflow, their logarithms do not
    assert dpc_knn(far, 2, 1, 10).tolist() == [0, 0, 1, 1]


def test_above_the_limit_separated_groups_are_found_again() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 16)) * 10
    truth = rng.integers(0, 5, 600)
    points = (centres[truth] + rng.normal(size=(600, 16)) * 0.1).astype(np.float32)
    for limit in (600, 60):
        labels = dpc_knn(points, 5, 5, limit)
        pairs = set(zip(labels.tolist(), truth.tolist(), strict=True))
        assert len(pairs) == 5, f"exact_limit {limit} does not recover the groups"
    assert (dpc_knn(points, 5, 5, 60) == dpc_knn(points, 5, 5, 60)).all()


def test_faiss_operations_in_blocks() -> None:
    rng = np.random.default_rng(0)
    points, queries = rng.normal(size=(90, 4)).astype(np.float32), rng.normal(size=(7, 4)).astype(np.float32)
    plain = np.sort(((queries[:, None] - points[None]) ** 2).sum(-1), 1)[:, :5]
    np.testing.assert_allclose(knn_squared(queries, points, 5, rows=13), plain, atol=1e-4)
    centroids, assignment = kmeans(points, 6, 0, rows=40)
    nearest = ((points[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
    assert (assignment == nearest).all()
