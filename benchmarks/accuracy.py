"""Accuracy of the reference VLM against visual tokens kept: `python -m benchmarks.accuracy` (resumes when run again).

Every method answers the same test questions (>= 2,000 a suite, scenes no codebook or tuning has seen) through the processor and
`generate`. Percent of full is relative to the unpruned model; its 95% interval is a paired bootstrap over questions. What is
answered is kept in `--work`, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from rich.console import Console

from benchmarks.downsample import shrunk, smaller_grid
from benchmarks.methods import METHODS, OURS, SMALLER, Setting
from benchmarks.reference_codebook import build
from benchmarks.report import publish
from codebook_prune import Codebook, VisionZipPruner, load_model
from reference_vlm import CHECKPOINT
from reference_vlm.evaluate import inputs_of, is_right
from reference_vlm.scenes import GRID, Scene, render
from reference_vlm.suites import SUITES, Prompt, make_suite

RATIOS = (0.5, 0.33, 0.22, 0.11, 0.056)
Taken = tuple[NDArray[np.bool_], dict[str, float]]
"""Right per question [n], and visual tokens."""
COUNTS = ("tokens_entering", "tokens_layer_avg", "tokens_final")
console = Console(stderr=True)


class Exam:
    """Questions whose images are encoded once: every method is asked the same. `draw` makes a scene's picture."""

    def __init__(self, model: Any, processor: Any, prompts: Sequence[Prompt], draw: Callable[[Scene], Image] = render) -> None:
        self.model, self.processor, self.prompts = model, processor, prompts
        self.order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].scenes), len(prompts[i].context)))  # little padding
        self.batches = list(self._encode(draw))

    @torch.inference_mode()
    def _encode(self, draw: Callable[[Scene], Image]) -> Iterator[tuple[list[Prompt], dict[str, Any]]]:
        short = all(len(p.scenes) == 1 and not p.context for p in self.prompts)
        size = 64 if short else 16
        for start in range(0, len(self.prompts), size):
            part = [self.prompts[i] for i in self.order[start : start + size]]
            inputs = dict(inputs_of(self.processor, part, draw).to(self.model.device))
            pixels = inputs.pop("pixel_values").to(self.model.dtype)
            with VisionZipPruner(keep_ratio=1.0)(self.model):  # what it reads of the encoder travels with the output
                encoded = self.model.get_image_features(pixel_values=pixels, return_dict=True)
            encoded.hidden_states = encoded.attentions = None
            yield part, {**inputs, "mm_encoder_outputs": {"image": encoded}}

    @torch.inference_mode()
    def take(self, pruner: Any | None) -> Taken:
        """(right per question [n], visual tokens of an image: entering the LLM, layer-averaged, in the last layer)."""
        right: list[bool] = []
        with pruner(self.model) if pruner is not None else nullcontext():
            for part, inputs in self.batches:
                ids = self.model.generate(**inputs, max_new_tokens=4, do_sample=False)
                given = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                right += [is_right(p.question, a) for p, a in zip(part, given, strict=True)]
        counts = dict.fromkeys(COUNTS, float(self.model.config.image_seq_length))
        if pruner is not None:
            stats = pruner.stats
            found = (np.mean(stats.tokens_after), stats.layer_averaged_tokens, np.mean(stats.tokens_final))
            counts = dict(zip(COUNTS, map(float, found), strict=True))
            if stats.text_before:
                counts |= {"text_entering": float(np.mean(stats.text_before)), "text_final": float(np.mean(stats.text_final))}
        in_order = np.empty(len(right), bool)
        in_order[self.order] = right
        return in_order, counts


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reference_codebook(work: Path) -> Path:
    """The codebook of 240 scenes for the shipped weights, built once and kept in `work`."""
    folder = work / f"codebook-{digest_of(CHECKPOINT / 'model.safetensors')[:12]}"
    return folder / "codebook" if (folder / "codebook" / "manifest.json").exists() else build(folder)


class Work:
    """Answers already given: one JSON line per suite, method and ratio in a file named after everything they depend on."""

    def __init__(self, folder: Path, codebook: Path, **identity: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        hashes = [digest_of(CHECKPOINT / "model.safetensors"), digest_of(codebook / "manifest.json")]
        name = hashlib.sha256(json.dumps([hashes, identity], sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"{name}.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {tuple(row["key"]): row for row in map(json.loads, lines)}

    def get(self, key: tuple[str, str, float]) -> Taken | None:
        """What was stored under (suite, method, ratio)."""
        row = self.done.get(key)
        return row and (np.array(list(row["right"])) == "1", row["counts"])

    def put(self, key: tuple[str, str, float], right: NDArray[np.bool_], counts: dict[str, float]) -> None:
        """Append one line."""
        row = {"key": key, "right": "".join("01"[int(r)] for r in right), "counts": counts}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.done[key] = row


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


def sit(exam: Exam, suite: str, pruners: Mapping[tuple[float, str], Any], work: Work) -> dict[tuple[float, str], Taken]:
    """Answers of every (ratio, method), from `work` where they are there already."""
    taken = {}
    for (ratio, name), pruner in pruners.items():
        key = (suite, name, ratio)
        found = work.get(key)
        if found is None:
            started = time.perf_counter()
            sitting = exam
            if name == SMALLER:
                small = partial(lambda grid, scene: shrunk(render(scene), *grid), smaller_grid(ratio * GRID * GRID))
                sitting = Exam(exam.model, exam.processor, exam.prompts, small)
            found = sitting.take(pruner)
            work.put(key, *found)
            seconds = time.perf_counter() - started
            console.print(f"{suite}: {name} at {ratio:.1%}: {100 * found[0].mean():.1f}% right, {seconds:.0f} s")
        taken[ratio, name] = found
    return taken


def examine(exam: Exam, suite: str, pruners: Mapping[tuple[float, str], Any], work: Work, seed: int) -> list[dict[str, Any]]:
    """All rows of one suite: unpruned, then every method at every ratio."""
    rows = []
    taken = sit(exam, suite, {(1.0, "unpruned"): None, **pruners}, work)
    full = taken[1.0, "unpruned"][0]
    for (ratio, name), (right, counts) in taken.items():
        more = rows_of(exam.prompts, full, right, seed, method=name, suite=suite, keep_ratio=ratio, **counts)
        if (ratio, OURS) in taken and name != OURS:
            more[0] |= lead(full, taken[ratio, OURS][0], right, seed)
        rows += more
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codebook", type=Path, help="default: build one from 240 scenes of the codebook split")
    parser.add_argument("--suites", nargs="+", choices=tuple(SUITES), default=list(SUITES))
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--questions", type=int, default=2016, help="a suite, spread evenly over its families")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="answers given so far")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/accuracy.json")
    args = parser.parse_args()
    model, processor = load_model(str(CHECKPOINT))
    folder = args.codebook or reference_codebook(args.work)
    codebook = Codebook.from_pretrained(folder)
    layers = model.config.get_text_config().num_hidden_layers
    made = {(r, m): METHODS[m](Setting(codebook, r, layers, args.seed)) for r in args.ratios for m in args.methods}
    pruners = {key: pruner for key, pruner in made.items() if pruner is not None}
    work = Work(args.work, codebook=folder, split=args.split, seed=args.seed, questions=args.questions)
    rows = []
    for suite in args.suites:
        exam = Exam(model, processor, make_suite(suite, args.split, args.questions // len(SUITES[suite][1])))
        rows += examine(exam, suite, pruners, work, args.seed)
    publish("accuracy", rows, args.seed, out=args.out)


if __name__ == "__main__":
    main()
