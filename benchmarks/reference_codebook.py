"""The codebook of the reference VLM that the benchmarks use: scenes of the codebook split, built in a plain loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from reference_vlm.shards import build_config, write_scene_shards


def build(folder: Path, images: int = 240) -> Path:
    """Build it in `folder` with the command a user would run; returns the codebook's folder."""
    shards = write_scene_shards(folder / "shards", images=images, per_shard=max(1, images // 8))
    config = folder / "build.yaml"
    config.write_text(yaml.safe_dump(build_config(shards, folder / "codebook")))
    command = [str(Path(sys.executable).with_name("codebook-build")), "run", str(config), "--local"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / "codebook"
