"""What probing finds out about one image's tokens, and its rows in the parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from codebook_schemas import ProbeConfig
from codebook_schemas.tables import probe_schema

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ImageScores:
    """One image's m probed visual tokens, ordered by token index.

    token: [m] raster index in the image's grid; where it has several (crops, tiles), these one after the other. position:
    [m, 2] (row, column) in the token's own grid. top1_prob, region_divergence, global_divergence: [m], the divergences NaN
    where the cascade made them needless, infinite where the model's answer was NaN. cls_similarity: [m] cosine to the encoder's
    [CLS], None for encoders without one. embeddings: [m, d] connector outputs.
    """

    key: str
    token: NDArray[np.int32]
    position: NDArray[np.int16]
    top1_prob: Floats
    region_divergence: Floats
    global_divergence: Floats
    cls_similarity: Floats | None
    embeddings: Floats

    @property
    def is_finite(self) -> bool:
        """False when the model answered with NaN or infinity (half precision overflows)."""
        answers = np.isfinite(self.embeddings).all() and np.isfinite(self.top1_prob).all()
        return bool(answers and not np.isinf([self.region_divergence, self.global_divergence]).any())


def joint_influence(region: Floats, whole: Floats, region_weight: float, global_weight: float) -> NDArray[np.float64]:
    """J = region_weight * region + global_weight * global [m] in float64; NaN where the cascade skipped an experiment."""
    found: NDArray[np.float64] = region_weight * region.astype(np.float64) + global_weight * whole.astype(np.float64)
    return found


def low_information(scores: ImageScores, thresholds: tuple[float, float], config: ProbeConfig) -> NDArray[np.bool_]:
    """Which probed tokens carry little information: [m] bool (arXiv 2503.20540, equation for J in section 3.2).

    top1_prob < t_p and region_weight * region + global_weight * global < t_j. A divergence the cascade skipped (NaN) means the
    token was already known not to qualify. With and without cascade the set is the same, up to scores that float noise
    (about 1e-6) moves across a threshold.

    Args:
        scores: one image's scores.
        thresholds: (t_p, t_j), on the scale of `config.divergence`.
        config: the weights.
    """
    influence = joint_influence(scores.region_divergence, scores.global_divergence, config.region_weight, config.global_weight)
    low: NDArray[np.bool_] = (scores.top1_prob < np.float64(thresholds[0])) & (influence < thresholds[1])
    return low


def to_table(scores: Sequence[ImageScores], shard: str, dimension: int) -> pa.Table:
    """Rows of `probe_schema` for the scores of some images; NaN divergences become null."""
    schema = probe_schema(dimension)
    counts = [len(s.token) for s in scores]

    def joined(name: str, shape: tuple[int, ...] = ()) -> Any:
        return np.concatenate([getattr(s, name) for s in scores] or [np.empty((0, *shape), np.float32)])

    def nullable(name: str) -> pa.Array:
        values = [
            np.full(n, np.nan, np.float32) if getattr(s, name) is None else getattr(s, name)
            for s, n in zip(scores, counts, strict=True)
        ]
        return pa.array(np.concatenate(values or [np.empty(0, np.float32)]), pa.float32(), from_pandas=True)

    position = joined("position", (2,))
    keys = pa.array([s.key for s, n in zip(scores, counts, strict=True) for _ in range(n)], pa.string())
    flat = pa.array(np.ascontiguousarray(joined("embeddings", (dimension,)), np.float32).reshape(-1))
    columns = [
        pa.array([shard] * sum(counts), pa.string()),
        keys,
        pa.array(joined("token").astype(np.int32)),
        pa.array(np.ascontiguousarray(position[:, 0], np.int16)),
        pa.array(np.ascontiguousarray(position[:, 1], np.int16)),
        pa.array(joined("top1_prob").astype(np.float32)),
        nullable("region_divergence"),
        nullable("global_divergence"),
        nullable("cls_similarity"),
        pa.FixedSizeListArray.from_arrays(flat, dimension),
    ]
    return pa.Table.from_arrays([c.cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
