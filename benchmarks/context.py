"""Context pruning behind a long misleading text, by its length: `python -m benchmarks.context` (resumes when run again).

The same questions as the image suite asks, behind 128 to 1,024 words about other pictures. Two controls show what language
alone would answer: a white and a black picture instead of the right one. Lengths may run at once, each in a process of its own
(`--words 1024`, one `--work`); a last run without arguments makes the table.

The paper drops in the first N of 32 layers, N up to a third of them. A third of the reference VLM's 8 layers would leave
N = 2 as the only choice, so N is 2, 3 or 4 here: up to half of the decoder, where p = 0.3 leaves 24% of the text (the paper's
10 layers leave 3%).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import OURS
from benchmarks.accuracy import interval
from benchmarks.answers import Work
from benchmarks.exam import Exam
from benchmarks.methods import QUESTION
from benchmarks.reference_codebook import reference_codebook
from benchmarks.report import publish
from codebook_prune import Codebook, CodebookDiversityPruner, ContextPruner, RateCurve, load_model
from reference_vlm import CHECKPOINT
from reference_vlm.scenes import SIDE, Scene
from reference_vlm.suites import SUITES, Prompt, text_prompt

LENGTHS = (128, 256, 512, 1024)
RATES = (0.05, 0.1, 0.2, 0.3, 0.4)
"""What the rate curve is fitted to, on validation questions."""
DEPTHS = (2, 3, 4)
"""N: how many of the first layers drop text."""


def prompts_of(split: str, words: int, number: int) -> list[Prompt]:
    """About `number` questions behind texts of `words` words, evenly over the families of the suite."""
    families = SUITES["text"][1]
    out: list[Prompt] = []
    for k, family in enumerate(families):
        found = 0
        for index in range(100 * number):
            prompt = text_prompt(split, index * 16 + k, family, np.random.default_rng((19, k, index)), words)
            out += [prompt] if prompt else []
            found += prompt is not None
            if found == number // len(families):
                break
    return out


def blank(level: int) -> Callable[[Scene], Image.Image]:
    """A renderer of one grey level, whatever the scene: what is left to answer from is language."""
    return lambda scene: Image.new("RGB", (SIDE, SIDE), (level,) * 3)


def sweep(model: Any, processor: Any, work: Work, words: int, questions: int) -> tuple[int, dict[float, float]]:
    """(text tokens of a prompt, rate -> accuracy) on validation questions behind texts of one length."""
    exam = Exam(model, processor, prompts_of("validation", words, questions))
    scores, entering = {}, 0
    for rate in RATES:
        right, counts = work.take(exam, ContextPruner(p=rate, layers=DEPTHS[0]), f"{words} words, validation: p={rate}")
        scores[rate], entering = float(right.mean()), round(counts["text_entering"])
    return entering, scores


def rows_to_run(codebook: Codebook, curve: RateCurve | None) -> dict[str, Any]:
    """Method -> pruner; without a curve (arXiv 2410.19732, appendix I) all but the row that uses it."""
    first = DEPTHS[0]
    methods: dict[str, Any] = {f"context p={p} N={n}": ContextPruner(p=p, layers=n) for p in (0.1, 0.2, 0.3) for n in DEPTHS}
    methods["context p=0.3, question kept"] = ContextPruner(p=0.3, layers=first, protect_last=QUESTION)
    if curve is not None:
        methods["context, fitted rate"] = ContextPruner(p=curve, layers=first)
    ours = CodebookDiversityPruner(codebook, keep_ratio=0.22, positions="original")
    methods[f"{OURS} 22%"] = ours
    methods[f"{OURS} 22% | context p=0.3"] = ours | ContextPruner(p=0.3, layers=first)
    methods[f"{OURS} 22% | context p=0.3, question kept"] = ours | methods["context p=0.3, question kept"]
    return methods


def rows_at(exam: Exam, words: int, methods: dict[str, Any], work: Work, seed: int) -> list[dict[str, Any]]:
    """All rows of one length: unpruned, every method, and the two controls."""
    full = work.take(exam, None, f"{words} words: unpruned")
    found = {"unpruned": full}
    found |= {name: work.take(exam, pruner, f"{words} words: {name}") for name, pruner in methods.items()}
    for name, level in {"white image": 255, "black image": 0}.items():
        other = Exam(exam.model, exam.processor, exam.prompts, blank(level), name)
        found[name] = work.take(other, None, f"{words} words: {name}")
    return [row_of(name, words, full[0], taken, seed) for name, taken in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codebook", type=Path, help="default: build one from 240 scenes of the codebook split")
    parser.add_argument("--questions", type=int, default=504, help="for each length of text")
    parser.add_argument("--words", type=int, nargs="+", choices=LENGTHS, help="only these lengths, and no fitted rate")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/context.json; with --words: a file in --work")
    args = parser.parse_args()
    model, processor = load_model(str(CHECKPOINT))
    codebook, work = Codebook.from_pretrained(args.codebook or reference_codebook(args.work)), Work(args.work)
    lengths = args.words or LENGTHS
    sweeps = dict(sweep(model, processor, work, words, args.questions // 4) for words in lengths)
    methods = rows_to_run(codebook, None if args.words else RateCurve.fit(sweeps))
    rows = []
    for words in lengths:
        exam = Exam(model, processor, prompts_of(args.split, words, args.questions))
        rows += rows_at(exam, words, methods, work, args.seed)
    part = args.work / f"context-{'-'.join(map(str, args.words))}.json" if args.words else None
    publish("context", rows, args.seed, out=args.out or part)


def row_of(name: str, words: int, full: Any, found: tuple[Any, dict[str, float]], seed: int) -> dict[str, Any]:
    """One row of the table."""
    right, counts = found
    return {
        "method": name,
        "suite": "text",
        "words": words,
        "n": len(right),
        "accuracy": float(right.mean()),
        "percent_of_full": 100 * float(right.mean()) / float(full.mean()),
        "ci95": interval(full, right, seed),
        **counts,
    }


if __name__ == "__main__":
    main()
