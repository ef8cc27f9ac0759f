"""The codebook of the reference VLM that the benchmarks use: scenes of the codebook split, built in a plain loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from reference_vlm.shards import build_config, write_scene_shards

PUBLISHED = {"max_cluster_size": 8, "inter_clusters": 64, "min_images": 30, "prototypes": "members"}
"""Selection as in arXiv 2503.20540; it asks for more than 64 of its 500 images, here for as large a share of 240."""


def build(folder: Path, images: int = 240) -> Path:
    """Build it in `folder` with the commands a user would run; returns its folder, `codebook`.

    Beside it, in `published`, stands what the published selection makes of the same scores.
    """
    shards = write_scene_shards(folder / "shards", images=images, per_shard=max(1, images // 8))
    settings = build_config(shards, folder / "codebook")
    config = folder / "build.yaml"
    config.write_text(yaml.safe_dump(settings))
    _codebook_build("run", str(config), "--local")
    config = folder / "published.yaml"
    config.write_text(yaml.safe_dump(settings | {"selection": PUBLISHED}))
    _codebook_build("select", str(config), "--output", str(folder / "published"))
    return folder / "codebook"


def _codebook_build(*words: str) -> None:
    subprocess.run([str(Path(sys.executable).with_name("codebook-build")), *words], check=True, stdout=sys.stderr)
