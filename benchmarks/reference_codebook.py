"""The codebooks of the reference VLM that the benchmarks use: scenes of the codebook split, built in a plain loop."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.digests import CODEBOOKS, digest_of
from reference_vlm.shards import build_config, write_scene_shards

IMAGES = 240
PAPER = {
    "intra_clusters": 8,
    "max_cluster_size": 8,
    "inter_clusters": 64,
    "min_images": 64 * IMAGES // 500,
    "prototypes": "members",
}
"""The published selection (arXiv 2503.20540): every vector of the clusters kept. Its `min_images` of 64 belongs to a build of
500 images; here it is as large a share of them."""


def run_tool(*words: str | Path) -> None:
    """`codebook-build` of this environment, as a user would run it."""
    subprocess.run([str(Path(sys.executable).with_name("codebook-build")), *map(str, words)], check=True, stdout=sys.stderr)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block of this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def settings(folder: Path, **selection: Any) -> dict[str, Any]:
    """The build's configuration, with changes of its selection."""
    shards = write_scene_shards(folder / "shards", images=IMAGES, per_shard=IMAGES // 8)
    config = build_config(shards, folder / "codebook")
    config["selection"] |= selection
    return config


def reference_codebook(work: Path) -> Path:
    """The codebook of 240 scenes for the shipped weights, built once and kept in `work`."""
    folder = work / f"codebook-{digest_of(CODEBOOKS)}"
    with alone(folder):
        if not (folder / "codebook" / "manifest.json").exists():
            config = folder / "build.yaml"
            config.write_text(yaml.safe_dump(settings(folder)))
            run_tool("run", config, "--local")
    return folder / "codebook"


def paper_codebook(work: Path) -> Path:
    """The same scores, selected from by the published rules."""
    folder = reference_codebook(work).parent
    with alone(folder):
        if not (folder / "paper" / "manifest.json").exists():
            config = folder / "paper.yaml"
            config.write_text(yaml.safe_dump(settings(folder, **PAPER)))
            run_tool("select", config, "--output", folder / "paper")
    return folder / "paper"
