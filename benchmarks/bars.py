"""The bars the project set itself before anything was measured, and whether the committed results meet them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import OURS
from benchmarks.cost_tables import probing_cases, whole_model
from benchmarks.pages import Report, listed, load_if_there, share, table
from benchmarks.suites import Suite

LEAST_KEPT = {0.22: 99.0, 0.11: 97.0, 0.056: 90.0}
"""Budget -> percent of the unpruned accuracy that our own method must keep."""
NAMED = ("random", "uniform", "FastV", "PyramidDrop", "DivPrune")
"""Rows against which the interval of the lead must exclude zero: where it does not, the two are level."""
OWN = "codebook_diversity"
"""Our own method in the runtime benchmark, where methods have the names of the command line."""
LARGE, SMALL = 1.0, 3.0
"""Percent of the unpruned prefill that the pruner may take at 7B size and on the reference VLM."""
PROMISED = 0.9
"""Of the speed-up to the first token that FLOPs promise."""
FASTER = 20.0
"""Times as fast as one generate() call an experiment, in model seconds on one thread."""
FASTER_GPU, UTILISED = 100.0, 0.4
"""The same for a 7B-size model on a GPU, and the share of its measured peak that batched experiments must reach."""


@dataclass(frozen=True)
class Verdict:
    """One bar in words, what was found, and whether it is met."""

    bar: str
    found: str
    met: bool


def accuracy_bars(suite: Suite) -> Iterator[Verdict]:
    """For each budget: percent kept, ahead of every row, and clearly so of the named ones."""
    for ratio, least in LEAST_KEPT.items():
        kept = suite.kept(OURS, ratio)
        if kept is None:
            continue
        yield Verdict(f"at least {least:.0f}% of unpruned at {share(ratio)} of the tokens", f"{kept:.1f}%", kept >= least)
        rivals = suite.rivals(ratio)
        ahead = [r["method"] for r in rivals if r["ours_ahead"] <= 0]
        unclear = [r["method"] for r in rivals if r["method"] in NAMED and r["ours_ahead_ci95"][0] <= 0]
        found = [f"{listed(ahead)} level or better"] if ahead else []
        found += [f"level with {listed(unclear)}"] if unclear else []
        yield Verdict(f"ahead of every other row at {share(ratio)}", "; ".join(found) or f"{len(rivals)} rows", not found)


def speed_bars(report: Report) -> Iterator[Verdict]:
    """The pruner's share of a prefill, and the time to the first token against what FLOPs promise."""
    rows = [r for r in report["rows"] if r["method"].split(",")[0] == OWN]
    groups = {
        f"pruner at most {LARGE:g}% of a 7B prefill": ([r for r in rows if "7B" in r["model"]], LARGE),
        f"pruner at most {SMALL:g}% of the reference VLM's prefill": (
            [r for r in rows if r["model"].startswith("reference") and r["keep_ratio"] == 0.22],
            SMALL,
        ),
    }
    for bar, (group, most) in groups.items():
        if group:
            shares = [float(r["prune_percent_of_prefill"]) for r in group]
            yield Verdict(bar, f"{span(shares, '%')} on a {kind(report)}", max(shares) <= most)
    for r in rows:
        if whole_model(r) and "ttft_speedup_of_promised" in r and r["model"].startswith("random") and r["keep_ratio"] == 0.22:
            reached = float(r["ttft_speedup_of_promised"])
            bar = f"first token within {1 - PROMISED:.0%} of what FLOPs promise, {r['visual_tokens']:,} visual tokens"
            yield Verdict(bar, f"{reached:.0%} of it", reached >= PROMISED)


def build_bars(report: Report) -> Iterator[Verdict]:
    """Model seconds against one generate() call an experiment."""
    gains = [float(rows[-1]["ratio_to_naive"]) for rows in probing_cases(report).values()]
    least, where = (FASTER_GPU, " at 7B size on a GPU") if kind(report) == "GPU" else (FASTER, "")
    if gains:
        enough = sum(gain >= least for gain in gains)
        found = f"{min(gains):.1f} to {max(gains):.1f} times, {enough} of {len(gains)} cases"
        yield Verdict(f"probing at least {least:.0f} times as fast as published{where}", found, enough == len(gains))
    used = [float(r["mfu"]) for r in report["rows"] if r["variant"].startswith("(b)")]
    if used and where:
        bar = f"batched experiments at {UTILISED:.0%} or more of the peak{where}"
        yield Verdict(bar, span([100 * u for u in used], "%"), min(used) >= UTILISED)


def cost_bars() -> list[Verdict]:
    """Speed and building, as far as they were measured."""
    found: list[Verdict] = []
    for name, judge in (("runtime", speed_bars), ("build", build_bars)):
        reports = (load_if_there(name), load_if_there(f"{name}.gpu"))
        found += [verdict for report in reports if report for verdict in judge(report)]
    return found


def span(values: list[float], unit: str) -> str:
    """0.2% to 0.5%; one value where they round to the same."""
    low, high = f"{min(values):.1f}{unit}", f"{max(values):.1f}{unit}"
    return low if low == high else f"{low} to {high}"


def kind(report: Report) -> str:
    """CPU or GPU."""
    return "CPU" if "threads" in report["device"] else "GPU"


def bars_table(verdicts: list[Verdict]) -> str:
    """A line for each bar."""
    return table(["bar", "found", ""], [[v.bar, v.found, "met" if v.met else "missed"] for v in verdicts])


def two_lists(verdicts: list[Verdict]) -> str:
    """All bars as two points of a list: those met and those missed."""
    points = []
    for word, met in (("Met", True), ("Missed", False)):
        chosen = [f"{v.bar} ({v.found})" for v in verdicts if v.met is met]
        points += [f"* {word}: {'; '.join(chosen)}."] if chosen else []
    return "\n".join(points)
