"""What a build costs: `python -m benchmarks.build`.

The same experiments on the same images, interleaved group by group, as many images as a worker takes at a time: (a) one
generate() call an experiment, as the public implementation of arXiv 2503.20540 makes them, and the least such a call can do;
(b) batched, nothing shared; (c) with shared prefixes, and batches that images share; (d) and the cascade. In float32 all must
find the same low-information tokens; in bfloat16 rounding decides close ones, and the share on which (a) and the others agree
is reported. Ratios are medians over groups; model seconds are CPU seconds of this process in the model (one thread), so that
other load disturbs less, or on a GPU those of the clock. There a model of LLaVA-1.5-7B's shape is probed at 96 tokens, as
published, and at all 576. Hours are what the paper's 500 images would take on one device, extrapolated. Whole builds are in
`benchmarks.whole_builds`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.build_ways import BatchedApart, GenerateEach, PlainProber, Spent
from benchmarks.report import publish
from benchmarks.timing import busy
from codebook_builder.costs import measured_peak
from codebook_builder.memory import keep_freed_memory
from codebook_builder.probe import AUTO_BUDGET, Prober
from codebook_builder.scores import ImageScores, low_information
from codebook_builder.vision import IMAGES_AT_ONCE
from codebook_prune import load_model
from codebook_schemas import ProbeConfig
from reference_vlm import CHECKPOINT
from reference_vlm.model import build_processor
from reference_vlm.scenes import make_scene, render

console = Console(stderr=True)
Way = PlainProber | Prober
Picture = tuple[Image.Image, str]
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


def random_llava_7b(device: str = "cuda") -> tuple[Any, Any]:
    """LLaVA-1.5-7B's shape with random bfloat16 weights: 576 visual tokens, CLIP-L/14 at 336 pixels."""
    torch.manual_seed(0)
    processor = build_processor()
    processor.image_processor.size = {"height": 336, "width": 336}
    processor.patch_size = 14
    image = load_model(str(CHECKPOINT))[0].config.image_token_id
    config = LlavaConfig(image_token_id=image, image_seq_length=576)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config).eval(), processor
    finally:
        torch.set_default_dtype(before)


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
    without: tuple[str, ...] = ()
    """Ways that would take too long."""

    @property
    def config(self) -> ProbeConfig:
        """Everything else at its default."""
        return ProbeConfig(tokens_per_image=self.probed, cascade=False)

    def ways(self, limits: tuple[float, float]) -> dict[str, Way]:
        """The variants by name."""
        loaded, config = (self.model, self.processor), self.config
        budget = AUTO_BUDGET.get(self.device.type, AUTO_BUDGET["cpu"])
        found: dict[str, Way] = {
            PUBLISHED: GenerateEach(*loaded, config, new_tokens=8, encode_each=True),
            LEAST: GenerateEach(*loaded, config, new_tokens=1, encode_each=False),
            "(b) batched, nothing shared": BatchedApart(*loaded, config, budget),
            "(c) and shared prefixes": Prober(*loaded, config, None),
            "(d) and cascade": Prober(*loaded, config.model_copy(update={"cascade": True}), limits),
        }
        return {name: way for name, way in found.items() if name not in self.without}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = self.model.get_input_embeddings().weight.device
        return found

    @property
    def exact(self) -> bool:
        """Whether all ways must agree about every token."""
        return bool(self.model.get_input_embeddings().weight.dtype == torch.float32)


def thresholds_of(scores: Sequence[ImageScores], quantile: float, config: ProbeConfig) -> tuple[float, float]:
    """Quantiles of top-1 probability and influence over all tokens."""
    top1 = np.concatenate([s.top1_prob for s in scores])
    influence = np.concatenate([s.region_divergence + config.global_weight * s.global_divergence for s in scores])
    return float(np.quantile(top1, quantile)), float(np.quantile(influence, quantile))


def agreement(reference: ImageScores, other: ImageScores, limits: tuple[float, float], config: ProbeConfig) -> float:
    """Share of the tokens both call low in information, or both do not; scores within 1e-5 of a threshold aside."""
    a, b = (low_information(s, limits, config) for s in (reference, other))
    influence = reference.region_divergence + config.global_weight * reference.global_divergence
    near: NDArray[np.bool_] = (abs(reference.top1_prob - limits[0]) < 1e-5) | (abs(influence - limits[1]) < 1e-5)
    return float((near | (a == b)).mean())


def spend(way: Way, pictures: Sequence[Picture], device: torch.device) -> tuple[list[ImageScores], Spent]:
    """A group's scores and what they took."""
    if isinstance(way, PlainProber):
        way.spent = Spent()
        return [way.probe(*picture) for picture in pictures], way.spent
    wall = time.perf_counter()
    prompts = [way.prepare(image) for image, _ in pictures]
    before, started = way.counters.flops, busy(device)
    scores = way.probe_prepared(prompts, [key for _, key in pictures])
    model = busy(device) - started
    return scores, Spent(model, time.perf_counter() - wall, way.counters.flops - before)


def peak(case: Case, size: int = 1536) -> float:
    """FLOPs per second of one large matrix product: of a GPU in the model's precision, else per CPU second, best of three."""
    if case.device.type == "cuda":
        return measured_peak(case.device, case.model.get_input_embeddings().weight.dtype)
    a, seconds = torch.ones(size, size), []
    for _ in range(3):
        started = time.process_time()
        torch.mm(a, a)
        seconds.append(time.process_time() - started)
    return 2.0 * size**3 / min(seconds)


def compare(case: Case) -> list[dict[str, Any]]:
    """All rows of one case."""
    pictures = [(render(make_scene("codebook", i)), f"scene-{i}") for i in range(case.images)]
    everything = Prober(case.model, case.processor, case.config, None)
    limits = thresholds_of(everything.probe(*zip(*pictures, strict=True)), case.quantile, case.config)
    ways = case.ways(limits)
    spent: dict[str, list[Spent]] = {name: [] for name in ways}
    agreed: dict[str, list[float]] = {name: [] for name in ways}
    peaks, low = [], 0
    for start in range(0, case.images, IMAGES_AT_ONCE):
        group = pictures[start : start + IMAGES_AT_ONCE]
        peaks.append(peak(case))
        first: list[ImageScores] = []
        for name, way in ways.items():
            scores, cost = spend(way, group, case.device)
            spent[name].append(cost)
            first = first or scores
            same = [agreement(a, b, limits, case.config) for a, b in zip(first, scores, strict=True)]
            if case.exact and min(same) < 1:
                raise RuntimeError(f"{group[same.index(min(same))][1]}: {name} disagrees about low-information tokens")
            agreed[name] += same
        low += sum(int(low_information(scores, limits, case.config).sum()) for scores in first)
        console.print(case.name, case.probed, group[0][1], [round(costs[-1].model, 2) for costs in spent.values()])
    cascade = next(way for name, way in ways.items() if "cascade" in name)
    work = cascade.counters.work(1.0) if isinstance(cascade, Prober) else None
    return [
        row(case, name, spent, statistics.median(peaks))
        | {"agreement": statistics.mean(agreed[name])}
        | {"experiments_skipped": work.skip_rate if work and "cascade" in name else 0.0}
        | {"low_information": low / (case.images * case.probed), "threshold_quantile": case.quantile}
        for name in spent
    ]


def row(case: Case, name: str, spent: dict[str, list[Spent]], peak: float) -> dict[str, Any]:
    """Totals of one variant and its medians against both naive ones."""

    def ratio(against: str, field: str) -> float | None:
        if against not in spent:
            return None
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
        "hours_for_500_images": 500 * wall / case.images / 3600,
        "ratio_to_naive": ratio(PUBLISHED, "model"),
        "wall_ratio_to_naive": ratio(PUBLISHED, "wall"),
        "ratio_to_least_naive": ratio(LEAST, "model"),
        "gflops_per_image": flops / case.images / 1e9,
        "mfu": flops / model / peak,
    }


def cases(groups: int) -> list[Case]:
    """Growth with the tokens probed (reference model), with the thresholds, and with the tokens of an image (random LLaVA)."""
    images = groups * IMAGES_AT_ONCE
    if torch.cuda.is_available():
        large, name = random_llava_7b(), "random LLaVA (LLaVA-1.5-7B's shape, bf16)"
        naive = (PUBLISHED, LEAST)
        small = Case(name, *large, 576, 96, 2, 0.35)  # one generate() an experiment takes minutes an image
        return [small, replace(small, images=images, without=naive), replace(small, probed=576, images=8, without=naive)]
    reference = load_model(str(CHECKPOINT))
    found = [Case("reference VLM", *reference, 144, probed, images, 0.35) for probed in (16, 48, 144)]
    found.append(Case("reference VLM", *reference, 144, 48, images, 0.15))
    for side, count in ((12, images), (24, 8), (54, 2)):
        found.append(Case("random LLaVA (d 512, 8 layers)", *random_llava(side, 512), side * side, 6, min(count, images), 0.35))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=3, help="of 8 images; large models take fewer images")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/build.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do; the naive ways gain by it too
    rows = [row for case in cases(args.groups) for row in compare(case)]
    publish("build", rows, 0, out=args.out)


if __name__ == "__main__":
    main()
