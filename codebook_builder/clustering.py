"""DPC-KNN: density peaks clustering with a k-nearest-neighbour density (Du et al. 2016), as in arXiv 2503.20540.

With D the Euclidean distance divided by sqrt(d):

* density   rho_i   = exp(-mean of D^2 to the k nearest other points)
* isolation delta_i = D to the nearest denser point; for the densest, the largest D to any point
* centres   = the n_clusters points of largest rho * delta; every other point joins the nearest centre

Nothing is left to chance: of equally dense points the one with the lower index counts as denser; equal rho * delta and equally
near centres go to the lower index too. rho * delta is compared in logarithms, so that far points do not underflow to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from codebook_builder.faiss_ops import kmeans, knn_squared

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Labels = NDArray[np.int64]
Blocks = Callable[[], Iterator[tuple[int, Doubles]]]

BLOCK_ELEMENTS = 1 << 24
MICRO_CLUSTERS = 2048


def dpc_knn(points: Floats, clusters: int, neighbours: int, exact_limit: int, seed: int = 0) -> Labels:
    """Cluster `points` [n, d]; labels [n] in 0 .. min(clusters, n) - 1, numbered by falling rho * delta of their centres.

    Up to `exact_limit` points every pair is compared, in blocks. Above, points are first gathered into at most
    `min(exact_limit, MICRO_CLUSTERS)` k-means micro-centroids. A micro-centroid's density is measured among all points, so the
    number of points it stands for counts; density peaks are then sought among micro-centroids, and every point follows its own.
    """
    n = len(points)
    if n == 0:
        return np.empty(0, np.int64)
    if n <= exact_limit:
        blocks = _squared_blocks(np.asarray(points, np.float64))
        return _peaks(blocks, _mean_squared_knn(blocks, n, neighbours), clusters)
    centroids, assignment = kmeans(points, min(exact_limit, MICRO_CLUSTERS), seed)
    used, assignment = np.unique(assignment, return_inverse=True)
    micro = centroids[used]
    nearest = knn_squared(micro, points, min(neighbours, n)) / points.shape[1]
    return _peaks(_squared_blocks(micro.astype(np.float64)), nearest.astype(np.float64).mean(1), clusters)[assignment]


def _squared_blocks(x: Doubles) -> Blocks:
    """A function that yields (first row, D^2 of some rows to all points); a single block is computed once and kept."""
    norms = np.einsum("ij,ij->i", x, x)
    rows = max(1, BLOCK_ELEMENTS // len(x))

    def block(start: int) -> Doubles:
        stop = min(start + rows, len(x))
        squared = norms[start:stop, None] + norms[None, :] - 2 * (x[start:stop] @ x.T)
        squared[np.arange(stop - start), np.arange(start, stop)] = 0
        scaled: Doubles = np.maximum(squared, 0) / x.shape[1]
        return scaled

    kept = block(0) if rows >= len(x) else None

    def blocks() -> Iterator[tuple[int, Doubles]]:
        for start in range(0, len(x), rows):
            yield start, block(start) if kept is None else kept

    return blocks


def _mean_squared_knn(blocks: Blocks, n: int, neighbours: int) -> Doubles:
    """-log rho: mean D^2 of every point to its nearest others [n]; fewer than `neighbours` if there are fewer."""
    k = min(neighbours, n - 1)
    out = np.zeros(n)
    if k == 0:
        return out
    for start, squared in blocks():
        rows = np.arange(len(squared))
        others = squared.copy()
        others[rows, start + rows] = np.inf
        out[start : start + len(rows)] = np.sort(np.partition(others, k - 1, axis=1)[:, :k], axis=1).mean(1)
    return out


def _peaks(blocks: Blocks, mean_squared: Doubles, clusters: int) -> Labels:
    """Labels [n] from the distances and -log rho [n] of n points."""
    n = len(mean_squared)
    order = np.lexsort((np.arange(n), mean_squared))
    rank = np.empty(n, np.int64)
    rank[order] = np.arange(n)
    delta = np.empty(n)
    for start, squared in blocks():
        mine = rank[start : start + len(squared)]
        denser = np.where(rank[None, :] < mine[:, None], squared, np.inf).min(1)
        delta[start : start + len(squared)] = np.sqrt(np.where(mine == 0, squared.max(1), denser))
    with np.errstate(divide="ignore"):
        gamma = np.log(delta) - mean_squared
    centres = np.lexsort((np.arange(n), -gamma))[: min(clusters, n)]
    by_index = np.argsort(centres)
    labels = np.empty(n, np.int64)
    for start, squared in blocks():
        labels[start : start + len(squared)] = by_index[squared[:, centres[by_index]].argmin(1)]
    labels[centres] = np.arange(len(centres))
    return labels
