"""`make demo`: from image shards to pruned answers with the shipped reference VLM, through a real local Ray job.

1. writes WebDataset shards of scenes;  2. starts a local Ray head and submits jobs/build_codebook.py to it;
3. asks held-out questions unpruned and at 50 / 22 / 11% of the visual tokens;  4. prints a table, writes two pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table

from codebook_schemas import UserError
from codebook_schemas.config import content_hash
from codebook_schemas.files import sha256_of
from reference_vlm import CHECKPOINT
from reference_vlm.demo_overlay import draw_overlays
from reference_vlm.evaluate import answers, inputs_of, is_right
from reference_vlm.local_ray import RAY, StartError, local_ray
from reference_vlm.scenes import GRID
from reference_vlm.suites import Prompt, make_suite

ROOT = Path(__file__).parents[1]
RATIOS = (1.0, 0.5, 0.22, 0.11)
FAMILIES = ("color", "shape", "count", "exist", "position", "relation")
console = Console()


@dataclass(frozen=True)
class Result:
    """One line of the demo's table."""

    method: str
    ratio: float
    tokens: float
    right: int
    prefill_ms: float


def build_codebook(folder: Path, images: int, workers: int) -> Path:
    """Write shards and configuration, submit the real job to a local Ray, return the codebook's folder.

    A codebook that is there is used again if it was built from this checkpoint and these images; else it is built again.

    Raises:
        UserError: there is a codebook that is none of the demo's.
    """
    from reference_vlm.shards import build_config, write_scene_shards

    console.rule(f"1  {images} training images as WebDataset shards")
    shards = write_scene_shards(folder / "shards", images=images, per_shard=max(1, images // 8))
    output = folder / "codebook"
    settings = build_config(shards, output, workers=workers)
    config = folder / "build.yaml"
    config.write_text(json.dumps(settings, indent=1) + "\n")
    console.print(f"{len(shards)} shards in {folder / 'shards'}, configuration in {config}")
    console.rule("2  ray job submit: probe, select, write the codebook")
    drop_stale(folder, content_hash([*map(sha256_of, [*checkpoint_files(), *shards]), settings | {"cluster": {}}]))
    if (output / "manifest.json").exists():
        console.print(f"{output} is already built from this checkpoint and these images: remove it to build it again")
        return output
    with local_ray(folder, workers) as env:
        script = [sys.executable, "jobs/build_codebook.py", str(config.resolve())]
        run_quietly([RAY, "job", "submit", "--log-style=record", "--working-dir", ".", "--", *script], env)
    return output


def checkpoint_files() -> list[Path]:
    """The files that the reference VLM is loaded from."""
    return sorted(path for path in CHECKPOINT.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))


def drop_stale(folder: Path, source: str) -> None:
    """Remove the demo's codebook and its scores if they were made from something else; `source` is kept beside them.

    Raises:
        UserError: there is a codebook, and no record that the demo made it.
    """
    record, made = folder / "built_from.txt", [folder / "codebook", folder / "codebook.run"]
    known = record.read_text().strip() if record.is_file() else None
    if known != source and any(path.exists() for path in made):
        if known is None:
            raise UserError(f"{folder} holds a codebook of unknown origin: remove it, or choose another --out")
        console.print(f"the codebook in {folder} was built from another checkpoint or other images: building it again")
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
    record.write_text(source + "\n")


def run_quietly(command: list[str], env: dict[str, str]) -> None:
    """Run a Ray command and show what the job itself prints and what goes wrong, without Ray's own progress notes."""
    with subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            if not re.search(r"\s(INFO|WARNING|SUCC)\s", line):
                console.print(line.rstrip(), markup=False, highlight=False)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def prefill_ms(model: Any, processor: Any, prompt: Prompt, pruners: Sequence[Any], rounds: int = 15) -> list[float]:
    """Median prefill milliseconds of one question under every pruner (None = unpruned), interleaved."""
    inputs = inputs_of(processor, [prompt])
    times: list[list[float]] = [[] for _ in pruners]
    with torch.inference_mode():
        for _ in range(rounds):
            for k, pruner in enumerate(pruners):
                with pruner(model) if pruner is not None else nullcontext():
                    started = time.perf_counter()
                    model(**inputs, logits_to_keep=1)
                    times[k].append(1000 * (time.perf_counter() - started))
    return [statistics.median(t) for t in times]


def pruners(codebook: Any, ratio: float) -> dict[str, Any]:
    """What is compared at one budget."""
    from codebook_prune import CodebookDiversityPruner, CodebookPruner, RandomPruner

    return {
        "codebook and diversity": CodebookDiversityPruner(codebook, keep_ratio=ratio),
        "codebook": CodebookPruner(codebook, keep_ratio=ratio, positions="original"),
        "random": RandomPruner(keep_ratio=ratio, positions="original"),
    }


def compare(model: Any, processor: Any, codebook: Any, questions: int) -> list[Result]:
    """Held-out questions, unpruned and with every method at every ratio."""
    from rich.progress import track

    items = make_suite("image", "test", questions // len(FAMILIES), FAMILIES)
    methods: list[tuple[str, float, Any]] = [("unpruned", 1.0, None)]
    for ratio in RATIOS[1:]:
        methods += [(name, ratio, pruner) for name, pruner in pruners(codebook, ratio).items()]
    times = prefill_ms(model, processor, items[0], [pruner for _, _, pruner in methods])
    results = []
    for (name, ratio, pruner), ms in zip(track(methods, "asking", console=console), times, strict=True):
        with pruner(model) if pruner is not None else nullcontext():
            given = answers(model, processor, items)
        tokens = sum(pruner.stats.tokens_after) / len(pruner.stats.tokens_after) if pruner is not None else GRID * GRID
        right = sum(is_right(i.question, a) for i, a in zip(items, given, strict=True))
        results.append(Result(name, ratio, tokens, right, ms))
    print_table(results, len(items))
    return results


def print_table(results: Sequence[Result], questions: int) -> None:
    """Answers right before and after, visual tokens, prefill time."""
    table = Table(title=f"{questions} held-out questions about {questions} held-out images")
    for column in ("method", "visual tokens", "answers right", "of unpruned", "prefill", "of unpruned "):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    full = results[0]
    for r in results:
        table.add_row(
            r.method,
            f"{r.tokens:.0f} ({r.ratio:.0%})",
            f"{r.right / questions:.1%}",
            f"{r.right / full.right:.1%}" if full.right else "",
            f"{r.prefill_ms:.1f} ms",
            f"{r.prefill_ms / full.prefill_ms:.2f} x",
        )
    console.print(table)


def draw_chart(results: Sequence[Result], questions: int, path: Path) -> None:
    """Bar chart of accuracy against visual tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    full = 100 * results[0].right / questions
    for k, (name, color) in enumerate((("codebook and diversity", "#2563eb"), ("codebook", "#93c5fd"), ("random", "#9ca3af"))):
        mine = [r for r in results if r.method == name]
        bars = axes.bar(
            [i + 0.28 * (k - 1) for i in range(len(mine))], [100 * r.right / questions for r in mine], 0.26, color=color
        )
        axes.bar_label(bars, fmt="%.0f")
        bars.set_label(name)
    axes.axhline(full, color="black", linestyle="--", linewidth=1, label=f"unpruned ({full:.0f}%)")
    axes.set_xticks(range(len(RATIOS) - 1), [f"{round(r * GRID * GRID)} tokens ({r:.0%})" for r in RATIOS[1:]])
    axes.set_ylabel("answers right, %")
    axes.set_ylim(0, 105)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise it as a UserError."""
        raise UserError(f"{message} (see --help)")


def at_least(smallest: int) -> Callable[[str], int]:
    """A type of command-line arguments: a whole number that is large enough."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be a whole number, {smallest} or more, not {text!r}")
        return int(text)

    return number


def run(arguments: Sequence[str] | None = None) -> None:
    """Build, compare, draw.

    Raises:
        UserError: bad input.
        subprocess.CalledProcessError: the build job failed.
    """
    from codebook_prune import Codebook, load_model

    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--images", type=at_least(8), default=240)
    parser.add_argument("--questions", type=at_least(len(FAMILIES)), default=600)
    parser.add_argument("--workers", type=at_least(1), default=min(4, os.cpu_count() or 1))
    args = parser.parse_args(arguments)
    folder: Path = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    codebook = Codebook.from_pretrained(build_codebook(folder, args.images, args.workers))
    console.rule("3  prune held-out images")
    model, processor = load_model(str(CHECKPOINT))
    results = compare(model, processor, codebook, args.questions)
    shown = {name: [pruners(codebook, ratio)[name] for ratio in RATIOS[1:]] for name in ("codebook and diversity", "random")}
    draw_overlays(model, processor, shown, folder / "overlay.png")
    draw_chart(results, args.questions // len(FAMILIES) * len(FAMILIES), folder / "accuracy.png")
    console.print(f"pictures: {folder / 'overlay.png'}, {folder / 'accuracy.png'}")
    console.print(f"codebook: {folder / 'codebook'} ({len(codebook)} prototypes); {time.perf_counter() - started:.0f} s in all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo: exit code 0, 1 (Ray or the job failed), 2 (bad input, in one line) or 130 (interrupted)."""
    try:
        run(arguments)
    except KeyboardInterrupt:
        return say("\ninterrupted: run the same command again, finished shards are kept", 130)
    except subprocess.CalledProcessError as error:
        return say(f"error: the build job failed (exit code {error.returncode}); its output is above", 1)
    except StartError as error:
        return say(f"error: {error}", 1)
    except UserError as error:
        return say(f"error: {error}", 2)
    except OSError as error:
        return say(f"error: {error.filename or 'a file'}: {error.strerror}", 2)
    return 0


def say(text: str, code: int) -> int:
    """Print one line and return the code to exit with."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
