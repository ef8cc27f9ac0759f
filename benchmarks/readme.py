"""Write the README's result tables from the committed JSON: `python -m benchmarks.readme` (`--check`: only compare)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT

START, END = "<!-- results -->", "<!-- end results -->"


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def accuracy(report: dict[str, Any]) -> str:
    """Percent of the unpruned accuracy by method and ratio on the image suite."""
    rows = [r for r in report["rows"] if r["family"] == "overall" and r["suite"] == "image"]
    ratios = sorted({r["keep_ratio"] for r in rows} - {1.0}, reverse=True)
    full = next(r for r in rows if r["method"] == "unpruned")
    methods = [m for m in dict.fromkeys(r["method"] for r in rows) if m != "unpruned"]
    percent = {(r["method"], r["keep_ratio"]): f"{r['percent_of_full']:.1f}" for r in rows}
    body = [[method, *(percent.get((method, ratio), "") for ratio in ratios)] for method in methods]
    head = ["accuracy, % of unpruned", *(f"{round(144 * r)} tokens" for r in ratios)]
    return (
        f"Accuracy of the reference VLM, {full['n']} held-out questions, unpruned {100 * full['accuracy']:.1f}% right, "
        f"visual tokens averaged over the layers (of 144; intervals, families of questions, charts: "
        f"[docs/accuracy.md](docs/accuracy.md); "
        f"`{report['command']}`):\n\n{table(head, body)}"
    )


SPEED = (("unpruned", 1.0), ("codebook", 0.22), ("codebook_diversity", 0.22), ("codebook_diversity", 0.11))
"""Methods of the runtime table, at 576 and at 2,880 visual tokens; the JSON has all of them."""


def runtime(report: dict[str, Any]) -> str:
    """Whole models against unpruned at two sizes, then what a pruner costs by itself."""
    rows = report["rows"]
    shown = [r for r in rows if "ttft_ms" in r and "random" in r["model"] and (r["method"], r["keep_ratio"]) in SPEED]
    body = [
        [
            f"{r['visual_tokens']:,} tokens, {r['method']}",
            f"{r['keep_ratio']:.0%}",
            f"{r['prefill_ms']:.0f}",
            *(f"{r[name]:.2f}" if name in r else "" for name in ("prefill_ratio", "ttft_ratio", "ttft_speedup_of_promised")),
            f"{r['peak_mb']:.0f}" if "peak_mb" in r else "",
            f"{r['prune_ms']:.1f}",
        ]
        for r in shown
    ]
    head = ["random LLaVA, d 1024, 8 layers", "kept", "prefill, ms", "of unpruned", "first token, of unpruned"]
    head += ["speed-up, of what FLOPs promise", "peak, MB", "pruner, ms"]
    alone = [
        f"{r['method']}, {r['visual_tokens']:,} tokens: {r['prune_percent_of_prefill']:.2f}%"
        for r in rows
        if "7B" in r["model"]
    ]
    one = [r for r in rows if "prefill_ratio_ci95" in r]
    small = [f"{r['method']}: {own_share(r)}" for r in one if "reference" in r["model"] and r["keep_ratio"] < 1]
    engine = [
        f"{r['model']}: {own_share(r)} in its hooks, whole passes {r['prefill_ratio'] - 1:+.1%} {interval(r)}"
        for r in one
        if "keep-all" in r["method"]
    ]
    return (
        f"Speed on {report['device']} (`{report['command']}`; every pruner, decode and memory: "
        f"[runtime.json](benchmarks/results/runtime.json)):\n\n{table(head, body)}\n\n"
        f"The pruner alone, of a prefill in LLaVA-1.5-7B's shape: {'; '.join(alone)}."
        + (f" Of the reference VLM's: {'; '.join(small)}." if small else "")
        + (f" The engine with a budget that holds everything: {'; '.join(engine)}." if engine else "")
    )


def own_share(row: dict[str, Any]) -> str:
    """Of an unpruned prefill."""
    return f"{row['prune_percent_of_prefill']:.1f}%"


def interval(row: dict[str, Any]) -> str:
    """Of a ratio to unpruned, as a change."""
    low, high = row["prefill_ratio_ci95"]
    return f"[{low - 1:+.1%}, {high - 1:+.1%}]"


def build(report: dict[str, Any]) -> str:
    """Cost of the experiments by variant, and of whole builds."""
    probing = [r for r in report["rows"] if r.get("ratio_to_naive") is not None]
    cases: dict[str, list[dict[str, Any]]] = {}
    for r in probing:
        name = f"{r['model']}: {r['probed']} of {r['tokens_per_image']} tokens, quantile {r['threshold_quantile']:g}"
        cases.setdefault(name, []).append(r)
    body = []
    for name, (naive, least, *rest) in cases.items():
        speed = [f"{r['ratio_to_naive']:.1f} x" for r in (least, *rest)]
        last = rest[-1]
        speed.append(f"{last['ratio_to_least_naive']:.1f} x")
        seconds = f"{naive['model_seconds'] / naive['images']:.2f}"
        body.append([name, seconds, *speed, f"{last['experiments_skipped']:.0%}", f"{last['mfu']:.0%}"])
    head = ["probing", "(a), s an image", "(a')", "(b)", "(c)", "(d)", "(d) over (a')", "skipped in (d)", "MFU of (d)"]
    return (
        "Building, one thread, CPU seconds in the model: (a) one `generate()` an experiment as published (image encoded in "
        "each, up to 8 tokens), (a') the same with the image encoded once and one token, (b) batched, nothing shared, "
        "(c) and shared prefixes, (d) and the cascade with both thresholds at a quantile; speed-up over (a) "
        f"(`{report['command']}`):\n\n{table(head, body)}"
    )


def whole_builds(report: dict[str, Any]) -> str:
    """Wall time and memory of builds by the command."""
    whole = [
        f"{r['variant'].removeprefix('whole build, ')}, {r['images']} images: {r['wall_seconds']:.0f} s"
        + (f", peak {r['peak_mb']:.0f} MB" if r["peak_mb"] else "")
        for r in report["rows"]
    ]
    return (
        "Whole builds at 48 tokens an image, 8 calibration images, wall time beside much other load "
        f"(`{report['command']}`): {'; '.join(whole)}."
    )


def selection(report: dict[str, Any]) -> str:
    """Time and memory of selecting among many survivors."""
    body = [
        [
            f"{r['survivors']:,}, {r['method']}",
            f"{r['seconds']:.0f}",
            f"{r['peak_mb'] / 1024:.1f}",
            "" if r["agreement"] is None else f"{r['agreement']:.3f}",
        ]
        for r in report["rows"]
    ]
    head = ["survivors of d = 1024", "CPU s", "peak GiB", "agreement with the approximation"]
    return f"Selection (`{report['command']}`; agreement: adjusted Rand index):\n\n{table(head, body)}"


def generated() -> str:
    """The README's results section."""
    parts = (accuracy, runtime, build, whole_builds, selection)
    return "\n\n".join(part(load(part.__name__)) for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    path = Path(ROOT / "README.md")
    text = path.read_text()
    before, rest = text.split(START, 1)
    wanted = f"{before}{START}\n{generated()}\n{END}{rest.split(END, 1)[1]}"
    if check and wanted != text:
        sys.exit("README.md differs from benchmarks/results: run python -m benchmarks.readme")
    path.write_text(wanted)


if __name__ == "__main__":
    main()
