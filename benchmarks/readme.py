"""Write the generated parts of README.md, docs/building.md and docs/speed.md from the committed JSON.

`python -m benchmarks.readme` (`--check`: only compare).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import OURS, RESULTS, ROOT, cost_tables
from benchmarks.bars import accuracy_bars, cost_bars, two_lists
from benchmarks.pages import fill, load, load_if_there, parameters, share, table, update
from benchmarks.suites import Suite, image_suite, suites_of

SHOWN = ("random", "uniform", "VisionZip", "DivPrune", "CDPruner", "codebook", OURS)
"""Methods of the README's table; docs/accuracy.md has all of them."""
BUDGETS = (0.22, 0.11, 0.056)


def results(suite: Suite) -> str:
    """A few methods at small budgets, behind what the figures are worth."""
    full = suite.full()
    body = [[name_of(m), *(suite.cell(m, ratio) for ratio in BUDGETS)] for m in SHOWN if m in suite.methods]
    counts = [round(ratio * full["tokens_entering"]) for ratio in BUDGETS]
    head = ["accuracy, % of unpruned", *(f"{share(r)} ({n} tokens)" for r, n in zip(BUDGETS, counts, strict=True))]
    asked = (
        f"{full['n']:,} held-out questions, {100 * full['accuracy']:.0f}% right with all {full['tokens_entering']:.0f} tokens"
    )
    return (
        f"The accuracy below is that of a {parameters():.0f}M-parameter model on drawn scenes: it compares methods under equal "
        f"conditions and\ndoes not tell what to expect of a large model on photographs. {asked}.\n"
        "Every method is given original positions. Our own method's parameters were chosen by validation questions to this "
        "model,\nthose of the others were not tuned.\n\n"
        f"{table(head, body)}\n\n"
        f"Budgets at which our own is clear of every other row: {clear_budgets(suites_of(load('accuracy')))}.\n\n"
        "All methods, budgets and intervals, and what is lost by kind of question: [docs/accuracy.md](docs/accuracy.md)."
    )


def clear_budgets(suites: Sequence[Suite]) -> str:
    """On how many of a suite's budgets every other row is behind ours, its paired interval above zero."""
    found = []
    for suite in suites:
        rivals = [suite.rivals(ratio) for ratio in suite.ratios]
        clear = sum(all(r["ours_ahead_ci95"][0] > 0 for r in rows) for rows in rivals)
        found.append(f"{suite.title} {clear} of {len(rivals)}")
    return "; ".join(found)


def name_of(method: str) -> str:
    """With the class, where the table's name does not tell it; our own is marked."""
    own = {OURS: f"**{OURS}** (`CodebookDiversityPruner`)", "codebook": "codebook (`CodebookPruner`)"}
    return own.get(method, method)


def limits(suite: Suite) -> str:
    """Which of the bars set beforehand are met, and what was never measured."""
    gpu = "" if any(RESULTS.glob("*.gpu.json")) else " Nothing has been measured on a GPU yet."
    lists = two_lists([*accuracy_bars(suite), *cost_bars()])
    return f"Limits: these bars were set before anything was measured, those of accuracy for one image.{gpu}\n\n{lists}"


def speeds() -> str:
    """The tables of runtime and throughput, of the CPU and, where one was measured, of a GPU."""
    parts = []
    for name, write in (("runtime", cost_tables.speed), ("throughput", cost_tables.throughput)):
        reports = {full: load_if_there(full) for full in (name, f"{name}.gpu")}
        parts += [write(full, report) for full, report in reports.items() if report]
    return "\n\n".join(parts)


def pages() -> dict[Path, str]:
    """Every page with its parts filled in."""
    image = image_suite()
    gpu = load_if_there("build.gpu")
    probing = [cost_tables.probing(load("build")), *([cost_tables.probing_on_gpu(gpu)] if gpu else [])]
    building = {
        "probing": "\n\n".join(probing),
        "whole builds": cost_tables.whole_builds(load("whole_builds")),
        "selection": cost_tables.selection(load("selection")),
    }
    parts = {
        "README.md": {"results": results(image), "limits": limits(image)},
        "docs/building.md": building,
        "docs/speed.md": {"speed": speeds()},
    }
    return {ROOT / name: fill((ROOT / name).read_text(), part) for name, part in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare the pages with the results")
    update(pages(), "readme", parser.parse_args().check)


if __name__ == "__main__":
    main()
