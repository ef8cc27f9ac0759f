"""Arrow schemas of the tables the build writes (needs pyarrow: the `build` extra)."""

from __future__ import annotations

import pyarrow as pa

_TOKEN = [
    pa.field("shard", pa.string(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("token", pa.int32(), nullable=False),
    pa.field("row", pa.int16(), nullable=False),
    pa.field("column", pa.int16(), nullable=False),
    pa.field("top1_prob", pa.float32(), nullable=False),
    pa.field("region_divergence", pa.float32()),
    pa.field("global_divergence", pa.float32()),
]


def probe_schema(dimension: int) -> pa.Schema:
    """One row a probed visual token.

    `token` is its raster index among its image's tokens (grids one after the other), (`row`, `column`) its place in its grid.
    `region_divergence` and `global_divergence` are null where the cascade made the experiment needless. `cls_similarity` is
    null for encoders without a [CLS] token. `embedding` is the connector output [dimension], float32.
    """
    extra = [
        pa.field("cls_similarity", pa.float32()),
        pa.field("embedding", pa.list_(pa.float32(), dimension), nullable=False),
    ]
    return pa.schema(_TOKEN + extra)


def provenance_schema() -> pa.Schema:
    """One row a prototype, in the order of the codebook: where it came from and its scores.

    For centroids, source and scores are those of the member nearest to the centroid.
    """
    extra = [pa.field("cluster", pa.int32(), nullable=False), pa.field("support", pa.int32(), nullable=False)]
    return pa.schema(_TOKEN + extra)
