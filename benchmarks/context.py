"""Context pruning behind a long misleading text, by its length: `python -m benchmarks.context` (resumes when run again).

The same questions as the image suite asks, behind 128 to 1,024 words about other pictures. Two controls show what language
alone would answer: a white and a black picture instead of the right one. The paper's N, 10 of 32 layers, is 2 of this model's
8; 3 and 4 show what more steps do. Lengths may be run in processes of their own, on one `--work`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks import OURS
from benchmarks.accuracy import Exam, Work, interval, reference_codebook
from benchmarks.methods import QUESTION, described
from benchmarks.report import publish
from codebook_prune import Codebook, CodebookDiversityPruner, ContextPruner, RateCurve, load_model
from reference_vlm import CHECKPOINT
from reference_vlm.scenes import SIDE, Scene
from reference_vlm.suites import SUITES, Prompt, text_prompt

LENGTHS = (128, 256, 512, 1024)
RATES = (0.05, 0.1, 0.2, 0.3, 0.4)
"""What the rate curve is fitted to, on validation questions."""
console = Console(stderr=True)


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


def fitted(model: Any, processor: Any, work: Work, layers: int, questions: int) -> RateCurve:
    """The rate by length of text (arXiv 2410.19732, appendix I), fitted to accuracies on validation questions."""
    sweeps = {}
    for words in LENGTHS:
        exam = Exam(model, processor, prompts_of("validation", words, questions))
        scores, entering = {}, 0
        for rate in RATES:
            pruner = ContextPruner(p=rate, layers=layers)
            key = (f"context, validation, {questions}", "context", float(words), described(pruner))
            found = work.get(key)
            if found is None:
                found = exam.take(pruner)
                work.put(key, *found)
            scores[rate], entering = float(found[0].mean()), round(found[1]["text_entering"])
        sweeps[entering] = scores
    return RateCurve.fit(sweeps)


def rows_to_run(codebook: Codebook, layers: int, curve: RateCurve) -> dict[str, Any]:
    """Method -> pruner; N is 2 to half of the layers."""
    third = max(2, layers // 3)
    methods: dict[str, Any] = {}
    for p in (0.1, 0.2, 0.3):
        methods |= {f"context p={p} N={n}": ContextPruner(p=p, layers=n) for n in range(2, layers // 2 + 1)}
    kept = ContextPruner(p=0.3, layers=third, protect_last=QUESTION)
    ours = CodebookDiversityPruner(codebook, keep_ratio=0.22, positions="original")
    methods["context p=0.3 N=2, question kept"] = kept
    methods["context, fitted rate, N=2"] = ContextPruner(p=curve, layers=third)
    return methods | {f"{OURS} 22%": ours, f"{OURS} 22% | context p=0.3 N=2, question kept": ours | kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codebook", type=Path, help="default: build one from 240 scenes of the codebook split")
    parser.add_argument("--words", type=int, nargs="+", choices=LENGTHS, default=list(LENGTHS), help="lengths of text")
    parser.add_argument("--questions", type=int, default=504, help="for each length of text")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/context.json")
    args = parser.parse_args()
    model, processor = load_model(str(CHECKPOINT))
    folder = args.codebook or reference_codebook(args.work)
    work = Work(args.work, folder, split=args.split, seed=args.seed, context_questions=args.questions)
    layers = model.config.get_text_config().num_hidden_layers
    curve = fitted(model, processor, work, max(2, layers // 3), args.questions // 4)
    methods = rows_to_run(Codebook.from_pretrained(folder), layers, curve)
    rows = []
    for words in args.words:
        prompts = prompts_of(args.split, words, args.questions)
        exam = Exam(model, processor, prompts)
        full = None
        for name, pruner in {"unpruned": None, **methods}.items():
            key = ("context", name, float(words), "" if pruner is None else described(pruner))
            found = work.get(key)
            if found is None:
                found = exam.take(pruner)
                work.put(key, *found)
                console.print(f"{words} words: {name}: {100 * found[0].mean():.1f}% right")
            full = found[0] if full is None else full
            rows.append(row_of(name, words, full, found, args.seed))
        for name, level in {"white image": 255, "black image": 0}.items():
            rows.append(row_of(name, words, full, Exam(model, processor, prompts, blank(level)).take(None), args.seed))
    publish("context", rows, args.seed, out=args.out)


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
