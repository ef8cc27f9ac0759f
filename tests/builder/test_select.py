"""Selection against a plain implementation of its three steps, and what it says when nothing is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from building import DIMENSION, image_scores, score_table
from test_clustering import direct

from codebook_builder.scores import to_table
from codebook_builder.select import Rule, select, spherical_mean
from codebook_schemas import SelectionConfig, UserError

RULE = Rule(top1_prob=0.6, influence=1.2, region_weight=1.0, global_weight=16.0)


def config(**changes: Any) -> SelectionConfig:
    values = {"neighbours": 3, "intra_clusters": 4, "max_cluster_size": 6, "inter_clusters": 3, "min_images": 2}
    return SelectionConfig.model_validate(values | changes)


def tables() -> list[pa.Table]:
    return [score_table("00000-a.tar", 4, 16, 0), score_table("00001-b.tar", 3, 16, 1)]


def plain(tables: list[pa.Table], rule: Rule, c: SelectionConfig) -> list[tuple[str, str, int]]:
    """(shard, key, token) of every prototype, with lists and loops."""
    rows = [row for table in tables for row in table.to_pylist()]
    survivors: list[dict[str, Any]] = []
    for image in dict.fromkeys((row["shard"], row["key"]) for row in rows):
        mine = [row for row in rows if (row["shard"], row["key"]) == image]
        labels = direct(np.array([row["embedding"] for row in mine], np.float32), c.intra_clusters, c.neighbours)
        for row, label in zip(mine, labels, strict=True):
            region, whole = row["region_divergence"], row["global_divergence"]
            if row["top1_prob"] >= rule.top1_prob or region is None or whole is None:
                continue
            low = rule.region_weight * region + rule.global_weight * whole < rule.influence
            if low and labels.count(label) <= c.max_cluster_size:
                survivors.append(row)
    labels = direct(np.array([row["embedding"] for row in survivors], np.float32), c.inter_clusters, c.neighbours)
    kept = []
    for label in set(labels):
        members = [row for row, mine in zip(survivors, labels, strict=True) if mine == label]
        if len({(row["shard"], row["key"]) for row in members}) > c.min_images:
            kept += [(row["shard"], row["key"], row["token"]) for row in members]
    return sorted(kept)


@pytest.mark.parametrize("changes", [{}, {"max_cluster_size": 3}, {"min_images": 4}, {"inter_clusters": 6, "min_images": 1}])
def test_members_equal_the_plain_implementation(tmp_path: Path, changes: dict[str, Any]) -> None:
    chosen = select(tables(), RULE, config(**changes), tmp_path)
    found = list(zip(*(chosen.provenance[name].to_pylist() for name in ("shard", "key", "token")), strict=True))
    assert sorted(found) == plain(tables(), RULE, config(**changes))
    rows = {(r["shard"], r["key"], r["token"]): r for table in tables() for r in table.to_pylist()}
    for vector, place in zip(chosen.prototypes, found, strict=True):
        assert vector.tolist() == rows[place]["embedding"]
    for cluster in set(chosen.cluster.tolist()):
        mine = chosen.cluster == cluster
        images = {place[:2] for place, member in zip(found, mine, strict=True) if member}
        assert set(chosen.support[mine].tolist()) == {len(images)}
    assert not list(tmp_path.iterdir())


def test_centroids_are_the_spherical_means_of_the_members(tmp_path: Path) -> None:
    members = select(tables(), RULE, config(), tmp_path)
    centroids = select(tables(), RULE, config(prototypes="centroids"), tmp_path)
    assert centroids.cluster.tolist() == sorted(set(members.cluster.tolist()))
    for i, cluster in enumerate(centroids.cluster):
        mine = members.prototypes[members.cluster == cluster].astype(np.float64)
        unit = mine / np.linalg.norm(mine, axis=1, keepdims=True)
        mean = unit.mean(0) / np.linalg.norm(unit.mean(0))
        found = centroids.prototypes[i] / np.linalg.norm(centroids.prototypes[i])
        np.testing.assert_allclose(found, mean, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(centroids.prototypes[i]), np.linalg.norm(mine, axis=1).mean(), rtol=1e-5)
        nearest = members.provenance.take(np.flatnonzero(members.cluster == cluster)).slice(int((unit @ mean).argmax()), 1)
        columns = ("shard", "key", "token")
        assert nearest.select(columns).equals(centroids.provenance.slice(i, 1).select(columns))


def test_a_mean_of_many_rows_is_read_in_blocks() -> None:
    vectors = np.random.default_rng(3).normal(size=(40_000, 3)).astype(np.float32) + 1
    rows = np.arange(5, 40_000, 1)
    unit = vectors[rows].astype(np.float64) / np.linalg.norm(vectors[rows].astype(np.float64), axis=1, keepdims=True)
    direction = unit.mean(0) / np.linalg.norm(unit.mean(0))
    mean, nearest = spherical_mean(vectors, rows)
    np.testing.assert_allclose(mean / np.linalg.norm(mean), direction, atol=1e-6)
    assert nearest == rows[(unit @ direction).argmax()]


def test_opposite_members_have_no_mean_direction() -> None:
    vectors = np.array([[1, 0], [-1, 0]], np.float32)
    mean, nearest = spherical_mean(vectors, np.arange(len(vectors)))
    assert (mean.tolist(), nearest) == ([1, 0], 0)


def test_the_way_rows_are_grouped_does_not_matter(tmp_path: Path) -> None:
    one = select(tables(), RULE, config(), tmp_path)
    joined = pa.concat_tables(tables())
    pieces = [joined.slice(i * 16, 16) for i in range(7)]
    two = select(pieces, RULE, config(), tmp_path)
    assert one.provenance.equals(two.provenance)
    assert (one.prototypes == two.prototypes).all()


def test_a_skipped_experiment_is_never_low_information(tmp_path: Path) -> None:
    scores = image_scores("k", 16, 0)
    scores.region_divergence[:8] = np.nan
    scores.global_divergence[4:12] = np.nan
    table = to_table([scores], "00000-a.tar", DIMENSION)
    everything = Rule(2.0, 1e9, 1.0, 16.0)
    chosen = select([table], everything, config(min_images=0, max_cluster_size=16, inter_clusters=1), tmp_path)
    assert sorted(chosen.provenance["token"].to_pylist()) == [12, 13, 14, 15]


@pytest.mark.parametrize(
    ("rule", "changes", "advice"),
    [
        (Rule(0.0, 1.2, 1, 16), {}, "112 tokens of 7 images probed, 0 with top-1 < 0.*: raise thresholds.top1_prob"),
        (Rule(0.6, 0.0, 1, 16), {}, "0 of them with influence < 0.*: raise thresholds.influence"),
        (Rule(0.6, 0.0, 1, 16, fixed=True), {}, "influence < 0.*: none is redundant by the codebook's own thresholds"),
        (RULE, {"intra_clusters": 1, "max_cluster_size": 8}, "0 of those in clusters of at most 8: raise .*max_cluster_size"),
        (
            RULE,
            {"min_images": 9},
            r"0 in clusters of more than 9 images \(largest: \d\): set selection.min_images to \d or less",
        ),
    ],
)
def test_nothing_selected_says_what_removed_it(tmp_path: Path, rule: Rule, changes: dict[str, Any], advice: str) -> None:
    with pytest.raises(UserError, match=advice):
        select(tables(), rule, config(**changes), tmp_path)
    with pytest.raises(UserError, match="no image could be read"):
        select([], RULE, config(), tmp_path)


def test_many_survivors_take_the_approximate_path(tmp_path: Path) -> None:
    chosen = select(tables(), RULE, config(exact_limit=16, min_images=0, max_cluster_size=16), tmp_path)
    again = select(tables(), RULE, config(exact_limit=16, min_images=0, max_cluster_size=16), tmp_path)
    assert chosen.counts["small_cluster"] > 16
    assert (chosen.prototypes == again.prototypes).all()
    assert len(chosen.prototypes) == chosen.counts["small_cluster"]
