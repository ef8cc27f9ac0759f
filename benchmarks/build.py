"""What a build costs: `python -m benchmarks.build`.

The same experiments on the same images, interleaved image by image: (a) one generate() call an experiment, as the public
implementation of arXiv 2503.20540 makes them, and the least such a call can do; (b) batched, nothing shared; (c) with shared
prefixes; (d) and the cascade. All must find the same low-information tokens. Ratios are medians over images; model seconds are
CPU seconds of this process in the model (one thread), so that other load on the machine disturbs less. Whole builds are in
`benchmarks.whole_builds`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from transformers import LlamaConfig, LlavaForConditionalGeneration

from benchmarks.build_ways import BatchedApart, GenerateEach, PlainProber, Spent
from benchmarks.report import publish
from codebook_builder.memory import keep_freed_memory
from codebook_builder.probe import AUTO_BUDGET, Prober
from codebook_builder.scores import ImageScores, low_information
from codebook_prune import load_model
from codebook_schemas import ProbeConfig
from reference_vlm import CHECKPOINT
from reference_vlm.model import build_processor
from reference_vlm.scenes import make_scene, render

console = Console(stderr=True)
Way = PlainProber | Prober
PUBLISHED = "(a) one generate() an experiment, as published"
LEAST = "(a') one generate() of one token, image encoded once"


def random_llava(side: int, width: int) -> tuple[Any, Any]:
    """A LLaVA of random weights: side x side visual tokens, 8 layers of `width`, the reference model's processor."""
    torch.manual_seed(0)
    config = load_model(str(CHECKPOINT))[0].config
    config.vision_config.image_size = side * config.vision_config.patch_size
    config.image_seq_length = side * side
    text = config.text_config.to_dict() | {
        "hidden_size": width, "intermediate_size": 11 * width // 4, "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64, "head_dim": 64,
    }  # fmt: skip
    config.text_config = LlamaConfig(**text)
    processor = build_processor()
    size = config.vision_config.image_size
    processor.image_processor.size = {"height": size, "width": size}
    return LlavaForConditionalGeneration(config).eval(), processor


@dataclass(frozen=True)
class Case:
    """One comparison: a model, how many tokens of each image are probed, and on how many images."""

    name: str
    model: Any
    processor: Any
    grid: int
    probed: int
    images: int
    quantile: float

    @property
    def config(self) -> ProbeConfig:
        """Everything else at its default."""
        return ProbeConfig(tokens_per_image=self.probed, cascade=False)

    def ways(self, limits: tuple[float, float]) -> dict[str, Way]:
        """The variants by name."""
        loaded, config = (self.model, self.processor), self.config
        return {
            PUBLISHED: GenerateEach(*loaded, config, new_tokens=8, encode_each=True),
            LEAST: GenerateEach(*loaded, config, new_tokens=1, encode_each=False),
            "(b) batched, nothing shared": BatchedApart(*loaded, config, AUTO_BUDGET["cpu"]),
            "(c) and shared prefixes": Prober(*loaded, config, None),
            "(d) and cascade": Prober(*loaded, config.model_copy(update={"cascade": True}), limits),
        }


def thresholds_of(scores: Sequence[ImageScores], quantile: float, config: ProbeConfig) -> tuple[float, float]:
    """Quantiles of top-1 probability and influence over all tokens."""
    top1 = np.concatenate([s.top1_prob for s in scores])
    influence = np.concatenate([s.region_divergence + config.global_weight * s.global_divergence for s in scores])
    return float(np.quantile(top1, quantile)), float(np.quantile(influence, quantile))


def same(reference: ImageScores, other: ImageScores, limits: tuple[float, float], config: ProbeConfig) -> bool:
    """Equal low-information sets, scores within 1e-5 of a threshold aside."""
    a, b = (low_information(s, limits, config) for s in (reference, other))
    influence = reference.region_divergence + config.global_weight * reference.global_divergence
    near: NDArray[np.bool_] = (abs(reference.top1_prob - limits[0]) < 1e-5) | (abs(influence - limits[1]) < 1e-5)
    return bool((near | (a == b)).all())


def spend(way: Way, image: Image.Image, key: str) -> tuple[ImageScores, Spent]:
    """One image's scores and what they took."""
    if isinstance(way, PlainProber):
        way.spent = Spent()
        return way.probe(image, key), way.spent
    wall = time.perf_counter()
    prompt = way.prepare(image)
    before, started = way.counters.flops, time.process_time()
    (scores,) = way.probe_prepared([prompt], [key])
    model = time.process_time() - started
    return scores, Spent(model, time.perf_counter() - wall, way.counters.flops - before)


def cpu_peak(size: int = 1536) -> float:
    """FLOPs per CPU second of one large matrix product on one thread, the best of three."""
    a, seconds = torch.ones(size, size), []
    for _ in range(3):
        started = time.process_time()
        torch.mm(a, a)
        seconds.append(time.process_time() - started)
    return 2.0 * size**3 / min(seconds)


def compare(case: Case) -> list[dict[str, Any]]:
    """All rows of one case."""
    pictures = [(render(make_scene("codebook", i)), f"scene-{i}") for i in range(case.images)]
    off = Prober(case.model, case.processor, case.config, None)
    limits = thresholds_of([off.probe([p], [k])[0] for p, k in pictures], case.quantile, case.config)
    ways = case.ways(limits)
    spent: dict[str, list[Spent]] = {name: [] for name in ways}
    peaks, low = [], 0
    for picture, key in pictures:
        peaks.append(cpu_peak())
        first: ImageScores | None = None
        for name, way in ways.items():
            scores, cost = spend(way, picture, key)
            spent[name].append(cost)
            first = first or scores
            if not same(first, scores, limits, case.config):
                raise RuntimeError(f"{key}: {name} disagrees about low-information tokens")
        low += int(low_information(first, limits, case.config).sum()) if first else 0
        console.print(case.name, case.probed, key, [round(costs[-1].model, 2) for costs in spent.values()])
    cascade = next(way for name, way in ways.items() if "cascade" in name)
    work = cascade.counters.work(1.0) if isinstance(cascade, Prober) else None
    return [
        row(case, name, spent, statistics.median(peaks))
        | {"experiments_skipped": work.skip_rate if work and "cascade" in name else 0.0}
        | {"low_information": low / (case.images * case.probed), "threshold_quantile": case.quantile}
        for name in spent
    ]


def row(case: Case, name: str, spent: dict[str, list[Spent]], peak: float) -> dict[str, Any]:
    """Totals of one variant and its medians against both naive ones."""

    def ratio(against: str, field: str) -> float:
        pairs = zip(spent[against], spent[name], strict=True)
        return float(statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs))

    model, wall, flops = (sum(getattr(s, field) for s in spent[name]) for field in ("model", "wall", "flops"))
    return {
        "variant": name,
        "model": case.name,
        "tokens_per_image": case.grid,
        "probed": case.probed,
        "images": case.images,
        "model_seconds": model,
        "wall_seconds": wall,
        "images_per_s": case.images / wall,
        "ratio_to_naive": ratio(PUBLISHED, "model"),
        "wall_ratio_to_naive": ratio(PUBLISHED, "wall"),
        "ratio_to_least_naive": ratio(LEAST, "model"),
        "gflops_per_image": flops / case.images / 1e9,
        "mfu": flops / model / peak,
    }


def cases(images: int) -> list[Case]:
    """Growth with the tokens probed (reference model), with the thresholds, and with the tokens of an image (random LLaVA)."""
    reference = load_model(str(CHECKPOINT))
    found = [Case("reference VLM", *reference, 144, probed, images, 0.35) for probed in (16, 48, 144)]
    found.append(Case("reference VLM", *reference, 144, 48, images, 0.15))
    for side, count in ((12, 3), (24, 2), (54, 1)):
        found.append(Case("random LLaVA (d 512, 8 layers)", *random_llava(side, 512), side * side, 6, count, 0.35))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=3, help="images of a case")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/build.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do; the naive ways gain by it too
    rows = [row for case in cases(args.images) for row in compare(case)]
    publish("build", rows, 0, out=args.out)


if __name__ == "__main__":
    main()
