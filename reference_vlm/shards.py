"""WebDataset shards of scenes, and the build configuration the demo and the benchmarks use on them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from codebook_builder.shards import write_shard
from reference_vlm import CHECKPOINT
from reference_vlm.scenes import make_scene, render


def write_scene_shards(
    folder: Path, *, images: int = 240, per_shard: int = 40, split: str = "codebook", backgrounds: Sequence[str] = ()
) -> list[Path]:
    """Write full-size scenes 0 .. `images` of a split as PNG into `folder`/scenes-00000.tar and so on; returns the paths.

    `backgrounds`: take turns with these; none: every scene draws its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, start in enumerate(range(0, images, per_shard)):
        path = folder / f"scenes-{number:05d}.tar"
        write_shard(path, _samples(split, range(start, min(images, start + per_shard)), backgrounds))
        paths.append(path)
    return paths


def _samples(split: str, indices: range, backgrounds: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for index in indices:
        buffer = io.BytesIO()
        background = backgrounds[index % len(backgrounds)] if backgrounds else None
        render(make_scene(split, index, background=background)).save(buffer, format="PNG")
        yield f"{split}-{index:06d}", {"png": buffer.getvalue()}


def build_config(shards: list[Path], output: Path, **cluster: Any) -> dict[str, Any]:
    """A `codebook-build run` configuration for the reference VLM; `cluster` goes into its cluster section."""
    return {
        "model": str(CHECKPOINT),
        "shards": [str(path) for path in shards],
        "output": str(output),
        "probe": {"tokens_per_image": 48},
        "thresholds": {"top1_prob": {"quantile": 0.6}, "influence": {"quantile": 0.6}, "calibration_images": 24},
        "selection": {
            "max_cluster_size": 16,
            "inter_clusters": 256,
            "min_images": len(shards) // 2,
            "prototypes": "centroids",
        },
        "cluster": cluster,
    }
