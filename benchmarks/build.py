"""What a build costs: `python -m benchmarks.build`.

1. The same experiments on the same images three ways, interleaved image by image: one plain forward pass an experiment
   (batch 1, nothing cached or shared), batched with shared prefixes, and with the cascade too. All three must find the
   same low-information tokens. Ratios are medians over images.
2. A whole build as a user runs it: images per second of wall time, peak memory of its process, bytes of the codebook.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from torch import Tensor

from benchmarks.reference_codebook import build as build_reference
from benchmarks.report import publish
from codebook_builder.divergence import divergence, top1_probability
from codebook_builder.probe import ImageScores, Prober, low_information
from codebook_builder.prompt import ablation_embedding, split_prompt
from codebook_prune import load_model
from codebook_prune.adapters.loading import adapter_for
from codebook_schemas import ProbeConfig
from reference_vlm import CHECKPOINT
from reference_vlm.scenes import make_scene, render

console = Console(stderr=True)
CONFIG = ProbeConfig(cascade=False)


class OneForwardPerExperiment:
    """The naive way: every experiment is a full forward pass over its own prompt, batch 1, no cache, all logits."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor, self.adapter = model, processor, adapter_for(model)
        prompt = split_prompt(self.adapter, processor, CONFIG, Image.new("RGB", (64, 64)))
        embed = model.get_input_embeddings()
        self.head, self.tail, self.ablated = embed(prompt.prefix), embed(prompt.suffix), ablation_embedding(model, processor)

    def logits(self, visual: Tensor) -> Tensor:
        """Last-position logits [V] of a prompt that shows `visual` [n, d]."""
        embeds = torch.cat([self.head, visual, self.tail])[None]
        hidden = self.adapter.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        found: Tensor = self.model.get_output_embeddings()(hidden)[0, -1]
        return found

    @torch.inference_mode()
    def probe(self, images: list[Image.Image], keys: list[str]) -> list[ImageScores]:
        """Scores of every token of every image."""
        return [self._probe(image, key) for image, key in zip(images, keys, strict=True)]

    def _probe(self, image: Image.Image, key: str) -> ImageScores:
        visual = self.adapter.encode(split_prompt(self.adapter, self.processor, CONFIG, image).inputs).embeddings
        n = len(visual)
        side = round(n**0.5)
        whole = self.logits(visual)
        scores = np.zeros((3, n), np.float32)
        for i in range(n):
            top, left = (min(max(c - 1, 0), side - 3) for c in divmod(i, side))
            window = torch.tensor([(top + r) * side + left + c for r in range(3) for c in range(3)])
            without, region = visual.clone(), visual[window].clone()
            without[window] = self.ablated
            with_token = self.logits(region)
            region[window == i] = self.ablated
            scores[0, i] = top1_probability(self.logits(visual[i : i + 1]), CONFIG.top_k_single)
            scores[1, i] = divergence(with_token, self.logits(region), CONFIG.divergence, CONFIG.top_k_divergence)
            scores[2, i] = divergence(whole, self.logits(without), CONFIG.divergence, CONFIG.top_k_divergence)
        token = np.arange(n, dtype=np.int32)
        position = np.stack([token // side, token % side], 1).astype(np.int16)
        return ImageScores(key, token, position, scores[0], scores[1], scores[2], None, visual.float().numpy())


def thresholds_of(scores: list[ImageScores], quantile: float) -> tuple[float, float]:
    """Quantiles of top-1 probability and influence over all tokens."""
    top1 = np.concatenate([s.top1_prob for s in scores])
    influence = np.concatenate([s.region_divergence + CONFIG.global_weight * s.global_divergence for s in scores])
    return float(np.quantile(top1, quantile)), float(np.quantile(influence, quantile))


def same(reference: ImageScores, other: ImageScores, limits: tuple[float, float]) -> bool:
    """Equal low-information sets, scores within 1e-5 of a threshold aside."""
    a, b = (low_information(s, limits, CONFIG) for s in (reference, other))
    influence = reference.region_divergence + CONFIG.global_weight * reference.global_divergence
    near: NDArray[np.bool_] = (abs(reference.top1_prob - limits[0]) < 1e-5) | (abs(influence - limits[1]) < 1e-5)
    return bool((near | (a == b)).all())


def experiment_rows(images: int, quantile: float) -> list[dict[str, Any]]:
    """Part 1."""
    model, processor = load_model(str(CHECKPOINT))
    pictures = [(render(make_scene("codebook", i)), f"scene-{i}") for i in range(images)]
    off = Prober(model, processor, CONFIG, None)
    limits = thresholds_of(off.probe([p for p, _ in pictures], [k for _, k in pictures]), quantile)
    on = Prober(model, processor, CONFIG.model_copy(update={"cascade": True}), limits)
    naive = OneForwardPerExperiment(model, processor)
    ways: tuple[OneForwardPerExperiment | Prober, ...] = (naive, off, on)
    seconds: dict[str, list[float]] = {"one forward per experiment": [], "batched, shared prefixes": [], "and cascade": []}
    for picture, key in pictures:
        found = []
        for name, prober in zip(seconds, ways, strict=True):
            started = time.perf_counter()
            found += prober.probe([picture], [key])
            seconds[name].append(time.perf_counter() - started)
        if not all(same(found[0], other, limits) for other in found[1:]):
            raise RuntimeError(f"{key}: the ways to probe disagree about low-information tokens")
        console.print(key, {name: round(times[-1], 2) for name, times in seconds.items()})
    first = seconds["one forward per experiment"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    skipped = on.counters.global_.skipped / max(1, on.counters.global_.asked)
    return [
        {
            "variant": name,
            "model": "reference VLM",
            "tokens_per_image": 144,
            "images": images,
            "model_seconds": sum(times),
            "wall_seconds": sum(times),
            "images_per_s": images / sum(times),
            "ratio_to_naive": statistics.median(a / b for a, b in zip(first, times, strict=True)),
            "mfu": None,
            "peak_mb": peak,
            "global_runs_skipped": skipped if name == "and cascade" else 0.0,
        }
        for name, times in seconds.items()
    ]


def build_row(images: int) -> dict[str, Any]:
    """Part 2."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        book = build_reference(Path(folder), images)
        wall = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        command = [str(Path(sys.executable).with_name("codebook-build")), "inspect", str(book), "--json"]
        summary = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return {
            "variant": "whole build, --local, 1 thread",
            "model": "reference VLM",
            "tokens_per_image": 48,
            "images": images,
            "wall_seconds": wall,
            "images_per_s": images / wall,
            "peak_mb": peak,
            "prototypes": summary["prototypes"],
            "artefact_bytes": summary["bytes"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8, help="images of part 1")
    parser.add_argument("--build-images", type=int, default=240, help="images of part 2")
    parser.add_argument("--quantile", type=float, default=0.5, help="thresholds of part 1, as a quantile of its own scores")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/build.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = experiment_rows(args.images, args.quantile)
    publish("build", [*rows, build_row(args.build_images)], 0, out=args.out)


if __name__ == "__main__":
    main()
