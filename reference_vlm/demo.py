"""`make demo`: from image shards to pruned answers with the shipped reference VLM, through a real local Ray job.

1. writes WebDataset shards of scenes;  2. starts a local Ray head and submits jobs/build_codebook.py to it;
3. asks held-out questions unpruned and at 50 / 22 / 11% of the visual tokens;  4. prints a table, writes two pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from reference_vlm import CHECKPOINT
from reference_vlm.demo_overlay import draw_overlays
from reference_vlm.evaluate import answers, inputs_of, is_right
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


def free_port() -> int:
    """A TCP port that is free on loopback now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def local_ray(folder: Path, cpus: int) -> Iterator[dict[str, str]]:
    """A Ray head with a job server on loopback that asks for a token; yields the environment its clients need.

    Only the processes started here are stopped.
    """
    port = free_port()
    env = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(16).hex(),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": f"http://127.0.0.1:{port}",
    }
    flags = {
        "node-ip-address": "127.0.0.1",
        "port": free_port(),
        "dashboard-host": "127.0.0.1",
        "dashboard-port": port,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "num-cpus": cpus,
        "object-store-memory": 200_000_000,
        "include-dashboard": "true",
    }
    command = [ray_command(), "start", "--head", "--block", *(f"--{key}={value}" for key, value in flags.items())]
    start_env = {k: v for k, v in env.items() if k != "RAY_ADDRESS"}
    with (
        open(folder / "ray.log", "w") as log,
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch,
    ):
        command.append(f"--temp-dir={scratch}")
        head = subprocess.Popen(command, env=start_env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_for(port, head, folder / "ray.log")
            yield env
        finally:
            stop(head)


def ray_command() -> str:
    """The ray executable of this environment."""
    return str(Path(sys.executable).with_name("ray"))


def wait_for(port: int, head: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> None:
    """Wait until the job server answers; RuntimeError if the head dies or takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if head.poll() is not None:
            break
        time.sleep(0.3)
    raise RuntimeError(f"the local Ray head did not start; see {log}")


def stop(head: subprocess.Popen[bytes]) -> None:
    """End the head, which ends what it started; what does not listen within 20 seconds is killed."""
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def build_codebook(folder: Path, images: int, workers: int) -> Path:
    """Write shards and configuration, submit the real job to a local Ray, return the codebook's folder."""
    from reference_vlm.shards import build_config, write_scene_shards

    console.rule(f"1  {images} training images as WebDataset shards")
    shards = write_scene_shards(folder / "shards", images=images, per_shard=max(1, images // 8))
    output = folder / "codebook"
    config = folder / "build.yaml"
    config.write_text(json.dumps(build_config(shards, output, workers=workers), indent=1) + "\n")
    console.print(f"{len(shards)} shards in {folder / 'shards'}, configuration in {config}")
    console.rule("2  ray job submit: probe, select, write the codebook")
    if (output / "manifest.json").exists():
        console.print(f"{output} is already built: remove {folder} to build it again")
        return output
    with local_ray(folder, workers) as env:
        script = [sys.executable, "jobs/build_codebook.py", str(config.resolve())]
        run_quietly([ray_command(), "job", "submit", "--log-style=record", "--working-dir", ".", "--", *script], env)
    return output


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


def main() -> None:
    """Run the demo."""
    from codebook_prune import Codebook, load_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    args = parser.parse_args()
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


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("\ninterrupted: run the same command again, finished shards are kept")
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        console.print(f"error: the build job failed (exit code {error.returncode}); its output is above")
        sys.exit(1)
