"""docs/accuracy.png: a few methods with direct labels, a panel for every suite measured at three budgets or more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import OURS
from benchmarks.suites import Suite

COLORS = {
    OURS: "#1d4ed8",
    "DivPrune": "#c2410c",
    "CDPruner": "#15803d",
    "VisionZip": "#7e22ce",
    "EVS": "#a16207",
    "codebook": "#60a5fa",
    "uniform": "#6b7280",
    "random": "#6b7280",
}
"""What is drawn, in the order of drawing from the front; the page's tables have every method."""
CONTROLS = ("uniform", "random")
LABELS = {"codebook": "codebook alone (paper)", "uniform": "even grid", "random": "random choice"}
LEAST_GAP = 0.048
"""Between two labels, as a share of the axis."""


def draw(suites: Sequence[Suite], path: Path) -> None:
    """Write the chart: percent of unpruned against the share of tokens kept, fewer to the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [suite for suite in suites if len(suite.ratios) > 2]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    with plt.rc_context({"font.size": 11 if columns == 1 else 15}):
        figure, axes = plt.subplots(rows, columns, figsize=((9, 4.8), (15, 6.4 * rows))[columns - 1], squeeze=False)
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
        for axis, suite in zip(axes.flat, shown, strict=False):
            panel(axis, suite)
        figure.tight_layout(w_pad=0 if columns == 1 else 2)
        figure.savefig(path, dpi=100, metadata={"Software": None})
        plt.close(figure)


def panel(axis: Any, suite: Suite) -> None:
    """One suite's lines, bands of 95% intervals and labels at the right ends."""
    ends: dict[str, tuple[float, float]] = {}
    for method, color in reversed(COLORS.items()):
        rows = [row for ratio in suite.ratios if (row := suite.row(method, ratio))]
        if not rows:
            continue
        x, y = [r["keep_ratio"] for r in rows], [r["percent_of_full"] for r in rows]
        low, high = zip(*(r["ci95"] for r in rows), strict=True)
        axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        style = "--" if method in CONTROLS else "-"
        axis.plot(x, y, style, color=color, linewidth=3.2 if method == OURS else 1.5, marker="o", markersize=4)
        ends[method] = x[-1], y[-1]
    axis.axhline(100, color="0.75", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(suite.ratios[0] * 1.06, suite.ratios[-1] * 0.94)
    axis.set_xticks(suite.ratios, suite.heads())
    axis.minorticks_off()
    axis.grid(axis="y", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    right = f"{100 * suite.full()['accuracy']:.0f}% right unpruned"
    axis.set_title(
        f"{suite.title[0].upper()}{suite.title[1:]}\naccuracy, % of unpruned ({right})", loc="left", fontsize="medium"
    )
    axis.set_xlabel("visual tokens kept")
    label(axis, ends)


def label(axis: Any, ends: dict[str, tuple[float, float]]) -> None:
    """Names at the ends of the lines, moved apart where they would touch."""
    low, high = axis.get_ylim()
    places = spread({method: (y - low) / (high - low) for method, (_, y) in ends.items()}, LEAST_GAP)
    for method, height in places.items():
        weight = "bold" if method == OURS else "normal"
        axis.annotate(
            LABELS.get(method, method),
            (1.0, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=COLORS[method],
            weight=weight,
        )


def spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Heights moved apart, as little as an equal push up and down does, until neighbours are `gap` apart; order kept."""
    names = sorted(heights, key=heights.__getitem__)
    values = [heights[name] for name in names]
    for _ in range(200):
        for i in range(len(values) - 1):
            short = gap - (values[i + 1] - values[i])
            if short > 0:
                values[i] -= short / 2
                values[i + 1] += short / 2
    return dict(zip(names, values, strict=True))
