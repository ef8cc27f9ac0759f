"""Accuracy of the reference VLM against visual tokens kept: `python -m benchmarks.accuracy` (resumes when run again).

Every method answers the same test questions (>= 2,000 a suite, scenes no codebook or tuning has seen) through the processor and
`generate`. Percent of full is relative to the unpruned model; its 95% interval is a paired bootstrap over questions. What is
answered is kept in `--work`, so an interrupted run goes on where it stopped. Parts (`--suites image` in one process, `--suites
text` in another, one `--work`) may run at once; a last run without arguments makes the table of all their answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import OURS
from benchmarks.answers import Work
from benchmarks.downsample import shrunk, smaller_grid
from benchmarks.exam import Exam
from benchmarks.methods import METHODS, SMALLER, Setting, positions_of, schedule_of
from benchmarks.reference_codebook import paper_codebook, reference_codebook
from benchmarks.report import publish
from codebook_prune import Codebook, load_model
from reference_vlm import CHECKPOINT
from reference_vlm.scenes import GRID, render
from reference_vlm.suites import SUITES, Prompt, make_suite

RATIOS = (0.5, 0.33, 0.22, 0.11, 0.056)


def interval(full: NDArray[np.bool_], pruned: NDArray[np.bool_], seed: int, draws: int = 2000) -> tuple[float, float]:
    """95% paired bootstrap interval of 100 * mean(pruned) / mean(full)."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(full), (draws, len(full)))
    ratio = 100 * pruned[picks].mean(1) / np.maximum(full[picks].mean(1), 1e-9)
    low, high = np.quantile(ratio, (0.025, 0.975))
    return float(low), float(high)


def lead(full: NDArray[np.bool_], ours: NDArray[np.bool_], right: NDArray[np.bool_], seed: int) -> dict[str, Any]:
    """How far our own method is ahead, in percent of the unpruned accuracy, with its 95% paired bootstrap interval."""
    picks = np.random.default_rng(seed).integers(0, len(full), (2000, len(full)))
    gap = ours.astype(np.float64) - right
    low, high = np.quantile(100 * gap[picks].mean(1) / full[picks].mean(1), (0.025, 0.975))
    return {"ours_ahead": float(100 * gap.mean() / full.mean()), "ours_ahead_ci95": (float(low), float(high))}


def rows_of(
    prompts: Sequence[Prompt], full: NDArray[np.bool_], right: NDArray[np.bool_], seed: int, **fields: Any
) -> list[dict[str, Any]]:
    """One row overall and one a question family."""
    families = np.array([p.question.family for p in prompts])
    rows = []
    for family in ("overall", *dict.fromkeys(families)):
        chosen = np.ones(len(prompts), bool) if family == "overall" else families == family
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


def examine(exam: Exam, suite: str, pruners: Mapping[tuple[float, str], Any], work: Work, seed: int) -> list[dict[str, Any]]:
    """All rows of one suite: unpruned, then every method at every ratio."""
    layers = exam.model.config.get_text_config().num_hidden_layers
    full, counts = work.take(exam, None, f"{suite}: unpruned")
    base = {"method": "unpruned", "suite": suite, "keep_ratio": 1.0, "positions": "original", "schedule": "all"}
    rows = rows_of(exam.prompts, full, full, seed, **base, **counts)
    taken = {}
    for (ratio, name), pruner in pruners.items():
        sitting = at_budget(exam, ratio) if name == SMALLER else exam
        taken[ratio, name] = work.take(sitting, pruner, f"{suite}: {name} at {ratio:.1%}")
    for (ratio, name), (right, counts) in taken.items():
        how = {"positions": positions_of(pruners[ratio, name]), "schedule": schedule_of(pruners[ratio, name], layers)}
        more = rows_of(exam.prompts, full, right, seed, method=name, suite=suite, keep_ratio=ratio, **how, **counts)
        if (ratio, OURS) in taken and name != OURS:
            more[0] |= lead(full, taken[ratio, OURS][0], right, seed)
        rows += more
    return rows


def at_budget(exam: Exam, ratio: float) -> Exam:
    """The same questions about pictures shrunk to a budget."""
    rows, columns = smaller_grid(ratio * GRID * GRID)
    draw = partial(lambda grid, scene: shrunk(render(scene), *grid), (rows, columns))
    return Exam(exam.model, exam.processor, exam.prompts, draw, f"{rows} x {columns}")


def pruners_of(suite: str, args: argparse.Namespace, setting: Callable[[float], Setting]) -> dict[tuple[float, str], Any]:
    """(ratio, method) -> pruner: what was asked for, else the suite's own methods and budgets, as far as there are any."""
    methods = args.methods or [name for name, method in METHODS.items() if suite in method.suites]
    made = {(ratio, name): METHODS[name].make(setting(ratio)) for ratio in args.ratios or RATIOS for name in methods}
    return {key: pruner for key, pruner in made.items() if pruner is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codebook", type=Path, help="default: build one from 240 scenes of the codebook split")
    parser.add_argument("--paper-codebook", type=Path, help="default: selected from the same scores; with --codebook: none")
    parser.add_argument("--suites", nargs="+", choices=tuple(SUITES), help="default: all")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), help="default: those of each suite")
    parser.add_argument("--ratios", nargs="+", type=float, choices=RATIOS, help="default: all")
    parser.add_argument("--questions", type=int, default=2016, help="a suite, spread evenly over its families")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="answers given so far")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/accuracy.json; of a part: a file in --work")
    args = parser.parse_args()
    model, processor = load_model(str(CHECKPOINT))
    codebook = Codebook.from_pretrained(args.codebook or reference_codebook(args.work))
    if (folder := args.paper_codebook) is None and args.codebook is None:
        folder = paper_codebook(args.work)
    paper = folder and Codebook.from_pretrained(folder)
    layers, work, rows = model.config.get_text_config().num_hidden_layers, Work(args.work), []
    for suite in args.suites or SUITES:
        exam = Exam(model, processor, make_suite(suite, args.split, args.questions // len(SUITES[suite][1])))
        pruners = pruners_of(suite, args, lambda ratio: Setting(codebook, ratio, layers, args.seed, paper))
        rows += examine(exam, suite, pruners, work, args.seed)
    part = args.work / f"part-{'-'.join(args.suites or SUITES)}.json" if args.suites or args.methods or args.ratios else None
    publish("accuracy", rows, args.seed, out=args.out or part)


if __name__ == "__main__":
    main()
