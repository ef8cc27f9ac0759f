"""Small real inputs for the build tests: shards of scenes, a config, probe tables, and tar files damaged on purpose."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from codebook_builder.scores import ImageScores, to_table
from codebook_builder.shards import write_shard
from codebook_schemas import BuildConfig
from reference_vlm import CHECKPOINT
from reference_vlm.scenes import make_scene, render

DIMENSION = 6


def scene_shards(folder: Path, shards: int = 3, images: int = 4, first: int = 0) -> str:
    """Write shards of scenes; returns their brace pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for s in range(shards):
        samples = ((f"{first + s}-{i}", {"png": render(make_scene("codebook", first + s * images + i), canvas=True)})
                   for i in range(images))  # fmt: skip
        write_shard(folder / f"s-{s:03d}.tar", samples)
    return str(folder / f"s-{{000..{shards - 1:03d}}}.tar")


def small_config(pattern: str, output: Path, **changes: Any) -> BuildConfig:
    """A build that takes seconds; keyword arguments replace whole sections."""
    data: dict[str, Any] = {
        "model": str(CHECKPOINT),
        "shards": [pattern],
        "output": str(output),
        "probe": {"tokens_per_image": 12},
        "thresholds": {"calibration_images": 5, "top1_prob": {"quantile": 0.8}, "influence": {"quantile": 0.8}},
        "selection": {"min_images": 1, "inter_clusters": 4, "intra_clusters": 4},
        "cluster": {"cpus_per_worker": 0.5},
    }
    return BuildConfig.parse(data | changes)


def write_config(config: BuildConfig, path: Path) -> Path:
    """The config as a YAML (JSON) file."""
    path.write_text(config.model_dump_json())
    return path


def image_scores(key: str, tokens: int, seed: int, dimension: int = DIMENSION) -> ImageScores:
    """Random scores of one image."""
    rng = np.random.default_rng(seed)
    token = np.arange(tokens, dtype=np.int32)
    return ImageScores(
        key=key,
        token=token,
        position=np.stack([token // 4, token % 4], 1).astype(np.int16),
        top1_prob=rng.random(tokens, np.float32),
        region_divergence=rng.random(tokens, np.float32),
        global_divergence=rng.random(tokens, np.float32) / 16,
        cls_similarity=None,
        embeddings=rng.normal(size=(tokens, dimension)).astype(np.float32),
    )


def score_table(shard: str = "00000-a.tar", images: int = 3, tokens: int = 16, seed: int = 0) -> pa.Table:
    """A probe table of some images with random scores."""
    scores = [image_scores(f"k{i}", tokens, seed * 1000 + i) for i in range(images)]
    return to_table(scores, shard, DIMENSION)


def png(seed: int = 0, size: int = 16) -> bytes:
    """A small PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A plain tar of members, in order."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
