"""A long run of the runtime: prune calls of random shapes and budgets in one process, watched for what grows."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.random_models import random_codebook, random_llava
from codebook_prune import CodebookDiversityPruner, CodebookPruner, DivPrunePruner, RandomPruner, UniformPruner

GRID, WIDTH, IMAGE = 4, 64, 999
MOST_MEMORY_MB, MOST_OBJECTS, MOST_SLOWDOWN = 16.0, 500, 1.5
"""Growth that is no problem: of memory (1.7 KB a call when there are 10,000), of objects that the garbage collector sees, and
of latency from the first to the last quarter."""


def resident_mb() -> float:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def hooks_of(model: Any) -> int:
    """Hooks on all modules of a model."""
    return sum(len(v) for m in model.modules() for k, v in vars(m).items() if k.endswith("_hooks") and isinstance(v, dict))


def some_input(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """One to three rows of 0 to 2 images each and some text, padded on the left; at least one image."""
    images = [int(n) for n in rng.integers(0, 3, int(rng.integers(1, 4)))]
    images[0] = max(1, images[0])
    rows = [[1, *[IMAGE] * GRID * GRID * n, *rng.integers(3, 900, int(rng.integers(1, 20)))] for n in images]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    pixels = torch.from_numpy(rng.normal(size=(sum(images), 3, 14 * GRID, 14 * GRID)).astype(np.float32))
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


def some_pruner(rng: np.random.Generator, book: Any) -> Any:
    """A method and a budget."""
    budgets: list[dict[str, Any]] = [{"keep_tokens": int(rng.integers(1, 20))}, {"keep_ratio": float(rng.uniform(0.05, 1))}]
    options = {**budgets[rng.integers(2)], "positions": str(rng.choice(["compact", "original"]))}
    kinds = [CodebookPruner, CodebookDiversityPruner, DivPrunePruner, RandomPruner, UniformPruner]
    kind: Any = kinds[rng.integers(len(kinds))]
    return kind(book, **options) if kind in kinds[:2] else kind(**options)


@torch.inference_mode()
def soak(calls: int, seed: int, warmup: int = 500) -> dict[str, Any]:
    """Make the calls, each in a block of its own; growth is that after the first `warmup` calls.

    Latency is that of one fixed call, some 200 times: the fastest of the first and of the last quarter, which other work on the
    machine changes least.
    """
    model, _ = random_llava(GRID, WIDTH, 2)
    book, rng = random_codebook(64, WIDTH), np.random.default_rng(seed)
    fixed = some_input(np.random.default_rng(0))
    model(**fixed)  # transformers puts hooks of its own on the tower at the first call
    hooks, warmup = hooks_of(model), min(warmup, calls // 2)
    times: list[float] = []
    failed = leaked = images = 0
    start: tuple[float, int] = (0.0, 0)
    for number in range(calls):
        pruner, inputs = some_pruner(rng, book), some_input(rng)
        with pruner(model):
            logits = model(**inputs, logits_to_keep=1).logits
        images += len(pruner.stats.tokens_before)
        failed += not bool(torch.isfinite(logits).all())
        leaked += hooks_of(model) != hooks
        if number == warmup:
            gc.collect()
            start = resident_mb(), len(gc.get_objects())
        if number >= warmup and number % max(1, calls // 200) == 0:
            begin = time.perf_counter()
            with CodebookPruner(book, keep_tokens=5)(model):
                model(**fixed)
            times.append(time.perf_counter() - begin)
    gc.collect()
    quarter = max(1, len(times) // 4)
    return {
        "trials": calls, "images": images, "not finite": failed, "hooks left": leaked,
        "memory growth, MB": round(resident_mb() - start[0], 1), "object growth": len(gc.get_objects()) - start[1],
        "latency, first quarter, ms": round(1000 * min(times[:quarter]), 2),
        "latency, last quarter, ms": round(1000 * min(times[-quarter:]), 2),
    }  # fmt: skip


def problem(found: Mapping[str, Any]) -> str:
    """What is wrong with what a soak found, by name; empty: nothing."""
    slowdown = found["latency, last quarter, ms"] / found["latency, first quarter, ms"]
    limits = {
        "not finite": (found["not finite"], 0), "hooks left": (found["hooks left"], 0), "latency": (slowdown, MOST_SLOWDOWN),
        "memory": (found["memory growth, MB"], MOST_MEMORY_MB), "objects": (found["object growth"], MOST_OBJECTS),
    }  # fmt: skip
    return ", ".join(name for name, (value, most) in limits.items() if not value <= most)
