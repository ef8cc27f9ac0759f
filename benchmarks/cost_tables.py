"""What running and building cost, as Markdown made from runtime.json, build.json, whole_builds.json and selection.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.pages import Report, listed, origin, share, table

Row = dict[str, Any]
Column = tuple[str, str, Callable[[Any], str]]


def milliseconds(value: float) -> str:
    """One decimal below 100."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


SPEED: tuple[Column, ...] = (
    ("prefill, ms", "prefill_ms", milliseconds),
    ("of unpruned", "prefill_ratio", "{:.2f}".format),
    ("FLOPs promise", "flops_ratio", "{:.2f}".format),
    ("first token, ms", "ttft_ms", milliseconds),
    ("of unpruned", "ttft_ratio", "{:.2f}".format),
    ("speed-up, of promised", "ttft_speedup_of_promised", "{:.0%}".format),
    ("decode, ms a token", "decode_ms", "{:.1f}".format),
    ("peak, MB", "peak_mb", "{:.0f}".format),
    ("pruner, ms", "prune_ms", "{:.1f}".format),
)
PROBING = """One thread, CPU seconds in the model:

* (a) one `generate()` call an experiment, as published: the image is encoded in each, up to eight tokens are generated;
* (a') the same with the image encoded once and one token generated;
* (b) one forward pass an experiment, batched, nothing shared;
* (c) and shared prefixes, and batches shared by up to eight images, as in a worker;
* (d) and the cascade, both thresholds at a quantile. All five find the same low-information tokens.

Columns (a') to (d): speed-up over (a), median over groups of images."""


def whole_model(row: Row) -> bool:
    """Whether a runtime row is of a whole answer, not of the pruner or one forward pass alone."""
    return "ttft_ms" in row


def speed(name: str, report: Report) -> str:
    """Everything in runtime.json or runtime.gpu.json: a table for every model, the pruner alone, one thread."""
    rows = report["rows"]
    parts = [f"From {origin(name, report)}"]
    for model, tokens in dict.fromkeys((r["model"], r["visual_tokens"]) for r in rows if whole_model(r)):
        own = [r for r in rows if whole_model(r) and (r["model"], r["visual_tokens"]) == (model, tokens)]
        parts += [f"### {model}, {tokens:,} visual tokens", speed_table(own)]
    at_size = [r for r in rows if "7B" in r["model"]]
    if at_size:
        head = ["pruner alone", "visual tokens", "pruner, ms", "prefill, ms", "share of the prefill"]
        parts += [f"### The pruner at full width: {at_size[0]['model']}", table(head, [alone(r) for r in at_size])]
    once = [r for r in rows if "prefill_ratio_ci95" in r]
    if once:
        head = ["one forward pass, CPU time", "kept", "of unpruned", "95% interval", "pruner, ms", "share of the prefill"]
        parts += ["### One thread", table(head, [one_pass(r) for r in once])]
    return "\n\n".join(parts)


def speed_table(rows: Sequence[Row]) -> str:
    """Methods of one model; columns nobody has a figure for are left out."""
    columns = [column for column in SPEED if any(column[1] in r for r in rows)]
    body = [
        [r["method"], share(r["keep_ratio"]), *(write(r[key]) if key in r else "" for _, key, write in columns)] for r in rows
    ]
    return table(["", "entering", *(head for head, _, _ in columns)], body)


def alone(row: Row) -> list[str]:
    """A pruner by itself."""
    cells = (f"{row['visual_tokens']:,}", f"{row['prune_ms']:.1f}", f"{row['prefill_ms']:,.0f}")
    return [row["method"], *cells, f"{row['prune_percent_of_prefill']:.2f}%"]


def one_pass(row: Row) -> list[str]:
    """One forward pass against unpruned."""
    low, high = row["prefill_ratio_ci95"]
    name = f"{row['model']}, {row['visual_tokens']} tokens: {row['method'].removesuffix(', one thread')}"
    cells = [share(row["keep_ratio"]), f"{row['prefill_ratio']:.3f}", f"{low:.3f}..{high:.3f}"]
    return [name, *cells, f"{row['prune_ms']:.2f}", f"{row['prune_percent_of_prefill']:.1f}%"]


def throughput(name: str, report: Report) -> str:
    """Requests a second by batch: for every model and batch one line, methods side by side."""
    rows = report["rows"]
    methods = list(dict.fromkeys((r["method"], r["keep_ratio"]) for r in rows))
    head = ["requests a second", *(m if ratio == 1 else f"{m} {share(ratio)}" for m, ratio in methods)]
    body = []
    for case in dict.fromkeys((r["model"], r["visual_tokens"], r["batch"]) for r in rows):
        own = {(r["method"], r["keep_ratio"]): r for r in rows if (r["model"], r["visual_tokens"], r["batch"]) == case}
        cells = [f"{r['requests_per_s']:.1f} ({r['requests_ratio']:.2f} x)" for r in map(own.__getitem__, methods)]
        body.append([f"{case[0]}, {case[1]} visual tokens, batch {case[2]}", *cells])
    return f"### Requests a second\n\n{table(head, body)}\n\nIn brackets: of unpruned. From {origin(name, report)}"


def probing_cases(report: Report) -> dict[str, list[Row]]:
    """Case -> its rows, (a) to (d)."""
    cases: dict[str, list[Row]] = {}
    for r in report["rows"]:
        if r.get("ratio_to_naive") is not None:
            name = f"{r['model']}: {r['probed']} of {r['tokens_per_image']} tokens, quantile {r['threshold_quantile']:g}"
            cases.setdefault(name, []).append(r)
    return cases


def probing(report: Report) -> str:
    """Cost of the experiments by variant."""
    body = []
    for name, (naive, least, *rest) in probing_cases(report).items():
        last = rest[-1]
        gains = [*(r["ratio_to_naive"] for r in (least, *rest)), last["ratio_to_least_naive"]]
        seconds = f"{naive['model_seconds'] / naive['images']:.2f}"
        shares = [f"{last['experiments_skipped']:.0%}", f"{last['mfu']:.0%}"]
        body.append([name, seconds, *(f"{gain:.1f} x" for gain in gains), *shares])
    head = ["probing", "(a), s an image", "(a')", "(b)", "(c)", "(d)", "(d) over (a')", "skipped in (d)", "MFU of (d)"]
    return f"{PROBING}\n\n{table(head, body)}\n\nFrom {origin('build', report)}"


def probing_on_gpu(report: Report) -> str:
    """The same on a GPU, where a case may lack the published way: every variant by itself, in seconds of the clock."""
    body = []
    for r in report["rows"]:
        name = f"{r['model']}: {r['probed']} of {r['tokens_per_image']} tokens, {r['variant']}"
        gain = "" if r["ratio_to_naive"] is None else f"{r['ratio_to_naive']:.1f} x"
        hours = f"{r['hours_for_500_images']:.2f}"
        body.append([name, f"{r['images_per_s']:.3g}", gain, f"{r['mfu']:.0%}", hours, f"{r['agreement']:.1%}"])
    head = ["on a GPU", "images a second", "speed-up over (a)", "MFU", "hours for 500 images", "agreement"]
    return (
        f"{table(head, body)}\n\nHours are extrapolated. Agreement: share of the tokens about which (a), or the first way "
        f"there is, says the same. From {origin('build.gpu', report)}"
    )


def whole_builds(report: Report) -> str:
    """Throughput of the largest builds, side by side, and whether memory grows with the number of images."""
    rows, most = report["rows"], max(r["images"] for r in report["rows"])
    body = [[how(r), f"{r['images_per_s']:.2f}"] for r in rows if r["images"] == most]
    held = [f"{r['peak_mb']:.0f} MB for {r['images']} images" for r in rows if r["peak_mb"]]
    memory = f" Peak memory of a build in one process: {listed(held)}." if held else ""
    return (
        f"Whole builds of {most} images, {rows[0]['probed']} tokens each, by the command, one after another, with start and "
        "calibration:\n\n"
        f"{table(['build', 'images a second'], body)}\n\n{memory.strip()} From {origin('whole_builds', report)}"
    )


def how(row: Row) -> str:
    """How a build ran."""
    return str(row["variant"]).removeprefix("whole build, ").replace("1 worker(s)", "1 worker").replace("(s)", "s")


def selection(report: Report) -> str:
    """Time and memory of selecting among many survivors."""
    body = [
        [
            f"{r['survivors']:,} ({r['points']}, d = {r['d']}): {r['method']}",
            f"{r['seconds']:.0f}",
            f"{r['peak_mb'] / 1024:.1f}",
            "" if r["agreement"] is None else f"{r['agreement']:.3f}",
        ]
        for r in report["rows"]
    ]
    head = ["survivors", "CPU s", "peak GiB", "agreement with the approximation"]
    return f"{table(head, body)}\n\nAgreement: adjusted Rand index. From {origin('selection', report)}"
