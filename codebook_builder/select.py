"""Selecting prototypes from stored scores: the context-independent condition (arXiv 2503.20540, method section 3). No model.

1. Within an image: DPC-KNN of its probed tokens into `intra_clusters`; low-information tokens in clusters of at most
   `max_cluster_size` members survive.
2. Across images: DPC-KNN of the survivors into `inter_clusters`; clusters whose members come from more than `min_images`
   distinct images are kept.
3. Prototypes are the members of the kept clusters, or one spherical mean a cluster.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from codebook_builder.clustering import dpc_knn
from codebook_builder.scores import joint_influence
from codebook_schemas import ProbeConfig, SelectionConfig, UserError
from codebook_schemas.tables import provenance_schema

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class Rule:
    """Low-information: top1_prob < t_p and region_weight * region + global_weight * global < t_j.

    `fixed`: the thresholds belong to a codebook that is extended, so advice must not be to change them.
    """

    top1_prob: float
    influence: float
    region_weight: float
    global_weight: float
    fixed: bool = False

    @classmethod
    def of(cls, thresholds: tuple[float, float], probe: ProbeConfig, *, fixed: bool = False) -> Rule:
        """The rule of resolved thresholds (t_p, t_j) and a probe configuration."""
        return cls(*thresholds, probe.region_weight, probe.global_weight, fixed)


@dataclass(frozen=True)
class Selection:
    """Prototypes [n, d] float32 with support [n] and cluster [n] int32, their provenance, and the counts after each step."""

    prototypes: Floats
    support: NDArray[np.int32]
    cluster: NDArray[np.int32]
    provenance: pa.Table
    counts: dict[str, int]


def embeddings_of(table: pa.Table) -> Floats:
    """The embedding column [rows, d]."""
    column = table["embedding"].combine_chunks()
    return np.asarray(column.flatten(), np.float32).reshape(table.num_rows, column.type.list_size)


def influence(table: pa.Table, region_weight: float, global_weight: float) -> NDArray[np.float64]:
    """Combined influence J [rows] in float64; NaN where the cascade skipped an experiment (then J is at least t_j)."""
    region, whole = (table[name].to_numpy() for name in ("region_divergence", "global_divergence"))
    return joint_influence(region, whole, region_weight, global_weight)


def low_information(table: pa.Table, rule: Rule) -> tuple[Mask, Mask]:
    """Two masks [rows]: top-1 below t_p, and both conditions met; an experiment that was skipped is never low."""
    below = table["top1_prob"].to_numpy().astype(np.float64) < rule.top1_prob
    return below, below & (influence(table, rule.region_weight, rule.global_weight) < rule.influence)


def images_of(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables of whole images cut into one table an image."""
    for table in tables:
        keys = table["key"].to_numpy(zero_copy_only=False)
        starts = [0, *(np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist(), len(keys)] if len(keys) else [0]
        for start, stop in pairwise(starts):
            yield table.slice(start, stop - start)


class _Survivors:
    """Rows that survived step 1: scores in memory, embeddings in an unlinked file, so that memory does not grow with d."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".survivors-")  # noqa: SIM115 - lives as long as the map
        self._tables: list[pa.Table] = []
        self._dimension = 0

    def add(self, table: pa.Table) -> None:
        vectors = embeddings_of(table)
        self._dimension = vectors.shape[1]
        self._file.write(vectors.tobytes())
        self._tables.append(table.drop_columns(["embedding", "cls_similarity"]))

    def read(self) -> tuple[pa.Table, Floats]:
        """(scores, embeddings [n, d] as a memory map), in the order they were added."""
        scores = pa.concat_tables(self._tables)
        self._file.flush()
        vectors = np.memmap(self._file, np.float32, "r", shape=(scores.num_rows, self._dimension))
        return scores, vectors


def select(tables: Iterable[pa.Table], rule: Rule, config: SelectionConfig, folder: Path | None, seed: int = 0) -> Selection:
    """Select prototypes from probe tables (whole images, in a fixed order); the same rows give the same result.

    Args:
        tables: rows of `probe_schema`, streamed; shards in order.
        rule: the low-information rule.
        config: the selection section of the build config.
        folder: where a temporary file of the survivors may lie; None: where the system keeps such files.
        seed: of the k-means above `exact_limit`.

    Raises:
        UserError: nothing is selected; gives the counts after each step and what to change.
    """
    counts = dict.fromkeys(("images", "tokens", "top1_below", "low_information", "small_cluster", "prototypes"), 0)
    survivors = _Survivors(folder)
    for image in images_of(tables):
        below, low = low_information(image, rule)
        counts["images"] += 1
        counts["tokens"] += image.num_rows
        counts["top1_below"] += int(below.sum())
        counts["low_information"] += int(low.sum())
        if not low.any():
            continue
        labels = dpc_knn(embeddings_of(image), config.intra_clusters, config.neighbours, config.exact_limit, seed)
        kept = low & (np.bincount(labels)[labels] <= config.max_cluster_size)
        if kept.any():
            rows = np.flatnonzero(kept)
            survivors.add(image.take(rows[np.argsort(image["token"].to_numpy()[rows], kind="stable")]))
            counts["small_cluster"] += len(rows)
    if not counts["small_cluster"]:
        raise UserError(_nothing_left(counts, rule, config, []))
    scores, vectors = survivors.read()
    labels = dpc_knn(vectors, config.inter_clusters, config.neighbours, config.exact_limit, seed)
    return _keep(scores, vectors, labels, counts, rule, config)


def _keep(
    scores: pa.Table, vectors: Floats, labels: NDArray[np.int64], counts: dict[str, int], rule: Rule, config: SelectionConfig
) -> Selection:
    """Steps 2 (min_images) and 3; kept clusters are renumbered 0, 1, ... by falling support, then by first member."""
    support = support_of(scores, labels)
    first = np.array([np.argmax(labels == label) for label in range(len(support))])
    kept = [int(c) for c in np.lexsort((first, -support)) if support[c] > config.min_images]
    if not kept:
        raise UserError(_nothing_left(counts, rule, config, support.tolist()))
    groups = [np.flatnonzero(labels == label) for label in kept]
    if config.prototypes == "members":
        rows = np.concatenate(groups)
        prototypes = np.asarray(vectors[rows])  # the one copy in memory
        sizes = [len(g) for g in groups]
    else:
        means = [spherical_mean(vectors, g) for g in groups]
        prototypes = np.stack([mean for mean, _ in means])
        rows = np.array([nearest for _, nearest in means])
        sizes = [1] * len(groups)
    cluster = np.repeat(np.arange(len(kept), dtype=np.int32), sizes)
    wide = np.repeat(support[kept].astype(np.int32), sizes)
    provenance = scores.take(rows).append_column("cluster", pa.array(cluster)).append_column("support", pa.array(wide))
    counts = counts | {"inter_clusters_kept": len(kept), "prototypes": len(prototypes)}
    return Selection(prototypes, wide, cluster, provenance.cast(provenance_schema()), counts)


def support_of(scores: pa.Table, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Distinct images (shard and key) of every cluster [clusters]."""
    pairs = pa.table({"shard": scores["shard"], "key": scores["key"], "label": pa.array(labels)})
    distinct = pairs.group_by(["shard", "key", "label"]).aggregate([])
    return np.bincount(distinct["label"].to_numpy(), minlength=int(labels.max()) + 1)


def spherical_mean(vectors: Floats, rows: Rows) -> tuple[Floats, int]:
    """The mean direction of some rows of `vectors` [n, d], scaled to their mean norm [d], and the row nearest to it by cosine.

    Memory does not grow with the number of rows: they are read in blocks, twice.
    """
    total, norm_sum = np.zeros(vectors.shape[1]), 0.0
    for _, unit, norms in _unit_blocks(vectors, rows):
        total += unit.sum(0)
        norm_sum += float(norms.sum())
    length = np.linalg.norm(total) / len(rows)
    if length < 1e-6:  # members cancel out: the mean has no direction, the first member stands for them
        return np.asarray(vectors[rows[0]], np.float32), int(rows[0])
    direction = total / len(rows) / length
    best, nearest = -np.inf, 0
    for members, unit, _ in _unit_blocks(vectors, rows):
        cosine = unit @ direction
        if cosine.max() > best:
            best, nearest = float(cosine.max()), int(members[cosine.argmax()])
    return (direction * norm_sum / len(rows)).astype(np.float32), nearest


def _unit_blocks(vectors: Floats, rows: Rows) -> Iterator[tuple[Rows, Doubles, Doubles]]:
    """Some rows at a time: their numbers, unit vectors and norms in float64."""
    for start in range(0, len(rows), BLOCK_ROWS):
        members = rows[start : start + BLOCK_ROWS]
        x = np.asarray(vectors[members], np.float64)
        norms = np.linalg.norm(x, axis=1)
        yield members, x / np.maximum(norms, 1e-12)[:, None], norms


def _nothing_left(counts: dict[str, int], rule: Rule, config: SelectionConfig, support: list[int]) -> str:
    """One line: counts after each step, the step that removed the last tokens, and what to change."""
    steps = (
        f"{counts['tokens']} tokens of {counts['images']} images probed, "
        f"{counts['top1_below']} with top-1 < {rule.top1_prob:.4g}, "
        f"{counts['low_information']} of them with influence < {rule.influence:.4g}, "
        f"{counts['small_cluster']} of those in clusters of at most {config.max_cluster_size}"
    )
    if not counts["tokens"]:
        advice = "no image could be read: see the skipped samples"
    elif rule.fixed and not counts["low_information"]:
        advice = (
            "none is redundant by the codebook's own thresholds: take other images, or build a new codebook with higher ones"
        )
    elif not counts["top1_below"]:
        advice = "raise thresholds.top1_prob"
    elif not counts["low_information"]:
        advice = "raise thresholds.influence"
    elif not counts["small_cluster"]:
        advice = "raise selection.max_cluster_size or selection.intra_clusters"
    else:
        steps += f", 0 in clusters of more than {config.min_images} images (largest: {max(support)})"
        advice = (
            f"set selection.min_images to {max(support) - 1} or less, lower selection.inter_clusters, or build from more images"
        )
    return f"no prototypes selected: {steps}: {advice}"
