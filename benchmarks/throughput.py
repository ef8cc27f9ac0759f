"""Requests a second in batches: `python -m benchmarks.throughput`.

Whole answers of `1 + NEW_TOKENS` tokens, vision encoder and pruner included, unpruned and with a few methods, interleaved;
ratios are medians of those to the unpruned model of the same round. The first token of one request says little about this:
decoding takes its share, and a pruner's fixed cost is spread over the batch.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_models import random_codebook, random_llava
from benchmarks.report import publish
from benchmarks.runtime import OWN_PROTOTYPES, PUBLISHED_PROTOTYPES, reference_input
from benchmarks.timing import DEVICE, NEW_TOKENS, Inputs, measure
from codebook_prune import parse_pruner
from codebook_prune.adapters.loading import adapter_for

METHODS = (("uniform", 0.22), ("divprune", 0.22), ("codebook_diversity", 0.22), ("codebook_diversity", 0.11))


def batch_rows(name: str, model: Any, inputs: Inputs, prototypes: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model and one batch."""
    adapter = adapter_for(model)
    codebook, batch = random_codebook(prototypes, adapter.hidden_size), len(inputs["input_ids"])
    made: dict[tuple[str, float], Any] = {("unpruned", 1.0): None}
    made |= {(spec, ratio): parse_pruner(spec, codebook=codebook, keep_ratio=ratio) for spec, ratio in METHODS}
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in made}
    peaks: dict[tuple[str, float], list[float]] = {key: [] for key in made}
    for number in range(rounds + 1):
        for key in list(made)[:: 1 if number % 2 else -1]:
            found = measure(model, inputs, made[key])
            if number:  # the first round warms up
                seconds[key].append((found["ttft_ms"] + NEW_TOKENS * found["decode_ms"]) / 1000)
                peaks[key].append(found["peak_mb"])
    full = seconds["unpruned", 1.0]
    return [
        {
            "method": method,
            "model": name,
            "visual_tokens": int(adapter.visual_mask(inputs["input_ids"]).sum()) // batch,
            "batch": batch,
            "keep_ratio": ratio,
            "requests_per_s": batch / statistics.median(own),
            "requests_ratio": statistics.median(a / b for a, b in zip(full, own, strict=True)),
            "peak_mb": statistics.median(peaks[method, ratio]),
        }
        for (method, ratio), own in seconds.items()
    ]


def repeated(inputs: Inputs, batch: int) -> Inputs:
    """The same request, so many times."""
    return {name: value.repeat(batch, *(1 for _ in value.shape[1:])) for name, value in inputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/throughput.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for batch in (1, 8, 32):
        rows += batch_rows("reference VLM (d 128, 8 layers)", *reference_input(batch), OWN_PROTOTYPES, 2 * args.rounds)
    model, inputs = random_llava(24, 512, 8, 1, DEVICE)
    for batch in (1, 8):
        name = "random LLaVA (d 512, 8 layers)"
        rows += batch_rows(name, model, repeated(inputs, batch), PUBLISHED_PROTOTYPES, args.rounds)
    publish("throughput", rows, 0, out=args.out)


if __name__ == "__main__":
    main()
