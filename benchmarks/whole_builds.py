"""Whole builds as a user runs them: `python -m benchmarks.whole_builds`. Wall time by images and workers, peak memory."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import publish
from reference_vlm.shards import build_config, write_scene_shards

LAUNCHER = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, flush=True)
sys.exit(done.returncode)
"""
"""A small process between: a child starts with the peak of the one it was forked from."""


def build_row(images: int, workers: int | None) -> dict[str, Any]:
    """A build by the command; `workers` None: --local."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_scene_shards(folder / "shards", images=images, per_shard=max(1, images // 8))
        config = build_config(shards, folder / "codebook") | {"selection": {"min_images": 0}}
        config["thresholds"] = config.get("thresholds", {}) | {"calibration_images": 8}
        config["cluster"] = {"workers": workers or 1, "cpus_per_worker": 1}
        (folder / "build.yaml").write_text(yaml.safe_dump(config))
        how = ["--local"] if workers is None else []
        command = [str(Path(sys.executable).with_name("codebook-build")), "run", str(folder / "build.yaml"), "--json", *how]
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", LAUNCHER, *command], check=True, stdout=subprocess.PIPE, text=True)
        wall = time.perf_counter() - started
        report, peak = map(json.loads, done.stdout.splitlines()[-2:])
        return {
            "variant": "whole build, --local" if workers is None else f"whole build, Ray, {workers} worker(s)",
            "model": "reference VLM",
            "tokens_per_image": 144,
            "probed": config["probe"]["tokens_per_image"],
            "images": images,
            "wall_seconds": wall,
            "images_per_s": images / wall,
            "mfu": report["work"]["mfu"],
            "experiments_skipped": report["work"]["skip_rate"],
            "peak_mb": peak / 1024 if workers is None else None,
            "prototypes": report["prototypes"],
            "artefact_bytes": sum(f.stat().st_size for f in (folder / "codebook").rglob("*") if f.is_file()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64], help="local builds; the last also with Ray")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/whole_builds.json")
    args = parser.parse_args()
    rows = [build_row(images, None) for images in args.images]
    rows += [build_row(args.images[-1], workers) for workers in args.workers]
    publish("whole_builds", rows, 0, out=args.out)


if __name__ == "__main__":
    main()
