"""Everything the build does with FAISS: writing index shards, k-NN and k-means. The one offline module that uses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from codebook_prune.index import import_faiss
from codebook_schemas.files import replace_atomically

Floats = NDArray[np.float32]

POINTS_A_CENTROID, ITERATIONS = 16, 10
"""What k-means is trained on and how often: its centroids only gather points, which ones exactly hardly matters."""


def index_bytes(vectors: Floats, first_id: int) -> bytes:
    """A flat inner-product index of L2-normalised rows [n, d] with global ids first_id .. first_id + n, serialised."""
    faiss = import_faiss()
    unit = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
    ids = np.arange(first_id, first_id + len(vectors), dtype=np.int64)
    index.add_with_ids(np.ascontiguousarray(unit, np.float32), ids)
    return bytes(faiss.serialize_index(index).tobytes())


def write_shards(folder: Path, vectors: Floats, rows_per_shard: int, first_id: int, first_shard: int) -> list[str]:
    """Write `index/shard-NNNNN.faiss` files for `vectors` [n, d]; returns their names relative to `folder`."""
    (folder / "index").mkdir(parents=True, exist_ok=True)
    names = []
    for number, start in enumerate(range(0, len(vectors), rows_per_shard), first_shard):
        name = f"index/shard-{number:05d}.faiss"
        replace_atomically(folder / name, index_bytes(vectors[start : start + rows_per_shard], first_id + start))
        names.append(name)
    return names


def _blocks(points: Floats, rows: int) -> Iterator[tuple[int, Floats]]:
    for start in range(0, len(points), rows):
        yield start, np.ascontiguousarray(points[start : start + rows], np.float32)


def knn_squared(queries: Floats, points: Floats, k: int, rows: int = 65_536) -> Floats:
    """Squared Euclidean distances [n, k] of `queries` [n, d] to their k nearest `points`, ascending.

    The points are read in blocks of `rows`, so they may be a memory map larger than memory.
    """
    faiss = import_faiss()
    best = np.empty((len(queries), 0), np.float32)
    for _, block in _blocks(points, rows):
        found, _ = faiss.knn(np.ascontiguousarray(queries, np.float32), block, min(k, len(block)))
        best = np.sort(np.concatenate([best, found], 1), 1)[:, :k]
    return np.maximum(best, 0)


def kmeans(points: Floats, clusters: int, seed: int, rows: int = 65_536) -> tuple[Floats, NDArray[np.int64]]:
    """FAISS k-means of `points` [n, d]: (centroids [clusters, d], assignment [n]).

    Trained on at most `rows` and `POINTS_A_CENTROID * clusters` evenly spaced points, assigned in blocks of `rows`: memory is
    bounded, and training costs the same however many points there are.
    """
    faiss = import_faiss()
    chosen = np.linspace(0, len(points) - 1, min(len(points), rows, POINTS_A_CENTROID * clusters)).round().astype(np.int64)
    sample = np.ascontiguousarray(points[chosen], np.float32)
    trainer = faiss.Kmeans(
        points.shape[1],
        clusters,
        niter=ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_A_CENTROID,
    )
    trainer.train(sample)
    centroids = np.ascontiguousarray(trainer.centroids, np.float32)
    assignment = np.empty(len(points), np.int64)
    for start, block in _blocks(points, rows):
        _, nearest = faiss.knn(block, centroids, 1)
        assignment[start : start + len(block)] = nearest[:, 0]
    return centroids, assignment


def build_options() -> tuple[str, int]:
    """(version and compile options of the installed FAISS, GPUs it can use).

    Raises:
        UserError: faiss is not installed.
    """
    faiss = import_faiss()
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    return f"{faiss.__version__} {faiss.get_compile_options().strip()}", gpus
