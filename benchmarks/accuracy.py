"""Accuracy of the reference VLM against visual tokens kept: `python -m benchmarks.accuracy --codebook DIR`.

Every method answers the same test questions (>= 2,000, scenes no codebook or tuning has seen) through the processor and
`generate`. Percent of full is relative to the unpruned model; its 95% interval is a paired bootstrap over questions.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.reference_codebook import build
from benchmarks.report import publish
from codebook_prune import Codebook, CodebookPruner, PyramidPruner, RandomPruner, UniformPruner, load_model
from reference_vlm import CHECKPOINT
from reference_vlm.evaluate import answers, is_right
from reference_vlm.scenes import GRID
from reference_vlm.suites import Prompt, make_suite

RATIOS = (0.5, 0.22, 0.11)
console = Console(stderr=True)


def pruners(codebook: Codebook, ratio: float, seed: int) -> dict[str, Any]:
    """Every method at one budget; a new method is one line."""
    return {
        "random": RandomPruner(keep_ratio=ratio, seed=seed),
        "uniform": UniformPruner(keep_ratio=ratio),
        "codebook": CodebookPruner(codebook, keep_ratio=ratio),
        "codebook | pyramid": CodebookPruner(codebook, keep_ratio=ratio) | PyramidPruner(),
    }


def rights(
    model: Any, processor: Any, items: Sequence[Prompt], pruner: Any | None
) -> tuple[NDArray[np.bool_], dict[str, float]]:
    """(right per question [n], mean visual tokens of an image: entering the LLM, layer-averaged, in the last layer)."""
    with pruner(model) if pruner is not None else nullcontext():
        given = answers(model, processor, items)
    right = np.array([is_right(i.question, a) for i, a in zip(items, given, strict=True)])
    counts = dict.fromkeys(("tokens_entering", "tokens_layer_avg", "tokens_final"), float(GRID * GRID))
    if pruner is not None:
        stats = pruner.stats
        found = (np.mean(stats.tokens_after), stats.layer_averaged_tokens, np.mean(stats.tokens_final))
        counts = dict(zip(counts, map(float, found), strict=True))
    return right, counts


def interval(full: NDArray[np.bool_], pruned: NDArray[np.bool_], seed: int, draws: int = 2000) -> tuple[float, float]:
    """95% paired bootstrap interval of 100 * mean(pruned) / mean(full)."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(full), (draws, len(full)))
    ratio = 100 * pruned[picks].mean(1) / np.maximum(full[picks].mean(1), 1e-9)
    low, high = np.quantile(ratio, (0.025, 0.975))
    return float(low), float(high)


def rows_of(
    items: Sequence[Prompt], full: NDArray[np.bool_], right: NDArray[np.bool_], seed: int, **fields: Any
) -> list[dict[str, Any]]:
    """One row overall and one a question family."""
    families = np.array([i.question.family for i in items])
    rows = []
    for family in ("overall", *dict.fromkeys(families)):
        chosen = np.ones(len(items), bool) if family == "overall" else families == family
        accuracy, base = float(right[chosen].mean()), float(full[chosen].mean())
        rows.append(
            {
                **{k: fields[k] for k in ("method", "suite")},
                "family": str(family),
                **{k: v for k, v in fields.items() if k not in ("method", "suite")},
                "n": int(chosen.sum()),
                "accuracy": accuracy,
                "percent_of_full": 100 * accuracy / max(base, 1e-9),
                "ci95": interval(full[chosen], right[chosen], seed),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codebook", type=Path, help="default: build one from 240 scenes of the codebook split")
    parser.add_argument("--per-family", type=int, default=260)
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/accuracy.json")
    args = parser.parse_args()
    model, processor = load_model(str(CHECKPOINT))
    items = make_suite("image", args.split, args.per_family)
    with tempfile.TemporaryDirectory() as folder:
        codebook = Codebook.from_pretrained(args.codebook or build(Path(folder)))
        full, counts = rights(model, processor, items, None)
        rows = rows_of(items, full, full, args.seed, method="unpruned", suite="image", keep_ratio=1.0, **counts)
        for ratio in RATIOS:
            for name, pruner in pruners(codebook, ratio, args.seed).items():
                right, counts = rights(model, processor, items, pruner)
                rows += rows_of(items, full, right, args.seed, method=name, suite="image", keep_ratio=ratio, **counts)
                console.print(f"{name} at {ratio:.0%}: {100 * right.mean() / full.mean():.1f}% of full")
        publish("accuracy", rows, args.seed, out=args.out)


if __name__ == "__main__":
    main()
