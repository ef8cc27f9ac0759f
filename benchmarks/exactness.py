"""Is the cascade exact? `python -m benchmarks.exactness`.

Probes images with and without the cascade, for both divergence scales and both ablation modes, and counts the tokens that are
low in information in one and not in the other. Thresholds are quantiles of the first images' scores, halfway to the next lower.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.report import publish
from codebook_builder.probe import Prober
from codebook_builder.scores import ImageScores, low_information
from codebook_prune import load_model
from codebook_schemas import ProbeConfig
from reference_vlm import CHECKPOINT
from reference_vlm.scenes import make_scene, render

CALIBRATION = 20


def between(values: NDArray[np.float64], quantile: float) -> float:
    """A threshold at a quantile that lies between two scores, so that rounding moves none across it."""
    ordered = np.unique(values)
    at = max(1, int(quantile * (len(ordered) - 1)))
    return float((ordered[at - 1] + ordered[at]) / 2)


def influence(scores: ImageScores, config: ProbeConfig) -> NDArray[np.float64]:
    """J of every token."""
    region, whole = scores.region_divergence.astype(np.float64), scores.global_divergence.astype(np.float64)
    combined: NDArray[np.float64] = config.region_weight * region + config.global_weight * whole
    return combined


def check(config: ProbeConfig, images: int, quantile: float, start: int = 0) -> dict[str, Any]:
    """Probe `images` scenes, from number `start` on, both ways."""
    model, processor = load_model(str(CHECKPOINT))
    pictures = [render(make_scene("codebook", start + i)) for i in range(images)]
    keys = [f"scene-{start + i}" for i in range(images)]
    off = Prober(model, processor, config.model_copy(update={"cascade": False}), None)
    everything = off.probe(pictures, keys)
    first = everything[:CALIBRATION]
    limits = (
        between(np.concatenate([s.top1_prob.astype(np.float64) for s in first]), quantile),
        between(np.concatenate([influence(s, config) for s in first]), quantile),
    )
    on = Prober(model, processor, config, limits)
    cascade = on.probe(pictures, keys)
    full = np.stack([low_information(s, limits, config) for s in everything])
    part = np.stack([low_information(s, limits, config) for s in cascade])
    near = [min(abs(s.top1_prob - limits[0]).min(), abs(influence(s, config) - limits[1]).min()) for s in everything]
    work = on.counters.work(1.0)
    return {
        "divergence": config.divergence,
        "ablation": config.ablation,
        "images": images,
        "tokens": full.size,
        "low_information": int(full.sum()),
        "different": int((full != part).sum()),
        "nearest_to_a_threshold": float(min(near)),
        "experiments_skipped": work.skip_rate,
        "flops_ratio": off.counters.flops / on.counters.flops,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16, help="tokens probed per image")
    parser.add_argument("--quantile", type=float, default=0.35)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/exactness.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scales: tuple[Literal["jsd", "reference"], ...] = ("jsd", "reference")
    modes: tuple[Literal["replace", "drop"], ...] = ("replace", "drop")
    rows = [
        check(ProbeConfig(tokens_per_image=args.tokens, divergence=scale, ablation=mode), args.images, args.quantile)
        for scale, mode in product(scales, modes)
    ]
    publish("exactness", rows, 0, out=args.out)
    if any(row["different"] for row in rows):
        raise SystemExit("the cascade is not exact")


if __name__ == "__main__":
    main()
