"""Selection at scale: `python -m benchmarks.selection`.

Synthetic survivors in clusters, as memory-mapped float32 rows: clustering across images and one spherical mean a cluster, as
`codebook-build` does after probing. Real clusters lie less far apart: visual tokens of the reference VLM are clustered too.
Every size runs in its own process, so that its peak memory is its own: `peak_mb` with the pages of the mapped file, `own_mb`
without, as it is at the end. Where exact DPC-KNN also runs, agreement is the adjusted Rand index of its labels and those of the
approximation. Seconds are CPU seconds on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.report import publish
from codebook_builder.clustering import MICRO_CLUSTERS, dpc_knn
from codebook_builder.select import spherical_mean
from codebook_prune import load_model
from codebook_schemas import SelectionConfig
from reference_vlm import CHECKPOINT
from reference_vlm.scenes import make_scene, render

CLUSTERS = 64
BLOCK = 16_384


def write_points(path: Path, count: int, dimension: int) -> NDArray[np.float32]:
    """`count` points around 64 centres of different size and tightness, as a memory map."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLUSTERS, dimension)).astype(np.float32)
    spread = rng.uniform(0.2, 0.6, size=CLUSTERS).astype(np.float32)
    share = rng.dirichlet(np.full(CLUSTERS, 2.0))
    points = np.memmap(path, np.float32, "w+", shape=(count, dimension))
    for start in range(0, count, BLOCK):
        own = rng.choice(CLUSTERS, size=min(BLOCK, count - start), p=share)
        noise = rng.standard_normal((len(own), dimension), dtype=np.float32)
        points[start : start + len(own)] = centres[own] + noise * spread[own, None]
    points.flush()
    del points
    return np.memmap(path, np.float32, "r", shape=(count, dimension))


def write_visual_tokens(path: Path, count: int) -> NDArray[np.float32]:
    """`count` visual tokens of the reference VLM, those of as many scenes as it takes, as a memory map."""
    model, processor = load_model(str(CHECKPOINT))
    found: list[NDArray[np.float32]] = []
    for index in range(math.ceil(count / model.config.image_seq_length)):
        image = render(make_scene("codebook", index))
        pixels = processor.image_processor(images=image, return_tensors="pt").pixel_values
        with torch.inference_mode():
            encoded = model.get_image_features(pixel_values=pixels.to(model.dtype), return_dict=True)
        found.append(torch.cat(list(encoded.pooler_output)).float().numpy())
    points = np.memmap(path, np.float32, "w+", shape=(count, found[0].shape[1]))
    points[:] = np.concatenate(found)[:count]
    points.flush()
    return points


def rand_index(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Adjusted Rand index of two labelings: 1 = the same clusters, 0 = chance."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)

    def pairs(x: NDArray[np.float64]) -> float:
        return float((x * (x - 1) / 2).sum())

    rows, columns, total = pairs(table.sum(1)), pairs(table.sum(0)), len(a) * (len(a) - 1) / 2
    expected = rows * columns / total
    return (pairs(table) - expected) / ((rows + columns) / 2 - expected)


def own_mb() -> float:
    """This process's own memory now, without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def measure(count: int, dimension: int, exact: bool) -> dict[str, Any]:
    """One size, in this process; dimension 0: visual tokens of the reference VLM."""
    config = SelectionConfig()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "points"
        points = write_points(path, count, dimension) if dimension else write_visual_tokens(path, count)
        wall, started = time.perf_counter(), time.process_time()
        limit = count if exact else min(config.exact_limit, count - 1)
        labels = dpc_knn(points, CLUSTERS, config.neighbours, limit)
        clustered = time.process_time() - started
        for label in range(labels.max() + 1):
            spherical_mean(points, np.flatnonzero(labels == label))
        seconds, wall = time.process_time() - started, time.perf_counter() - wall
        row: dict[str, Any] = {
            "method": "exact DPC-KNN" if exact else f"{MICRO_CLUSTERS} micro-clusters",
            "points": "synthetic clusters" if dimension else "visual tokens of the reference VLM",
            "survivors": count,
            "d": points.shape[1],
            "seconds": seconds,
            "clustering_seconds": clustered,
            "wall_seconds": wall,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "own_mb": own_mb(),
            "agreement": None,
        }
        if exact:
            row["agreement"] = rand_index(labels, dpc_knn(points, CLUSTERS, config.neighbours, MICRO_CLUSTERS))
        return row


def apart(count: int, dimension: int, exact: bool) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.selection", "--one", str(count), "--dimension", str(dimension)]
    done = subprocess.run(
        command + ["--exact"] * exact, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found, file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--exact-sizes", type=int, nargs="+", default=[5_000, 10_000])
    parser.add_argument("--dimension", type=int, default=1024)
    parser.add_argument("--one", type=int, help="measure one size in this process and print it")
    parser.add_argument("--exact", action="store_true", help="with --one: exact DPC-KNN, and the approximation's agreement")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/selection.json")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.dimension, args.exact)))
        return
    rows = [apart(n, dimension, True) for dimension in (args.dimension, 0) for n in args.exact_sizes]
    rows += [apart(n, args.dimension, False) for n in args.sizes]
    publish("selection", rows, 0, out=args.out)


if __name__ == "__main__":
    main()
