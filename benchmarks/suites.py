"""The rows of the accuracy benchmark, one suite of questions at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import OURS
from benchmarks.pages import Report, load, share

Row = dict[str, Any]
NAMES = {
    "image": "one image",
    "images": "two to four images",
    "video": "videos of four frames",
    "text": "one image and a misleading text of 128 to 1,024 words",
}


@dataclass(frozen=True)
class Suite:
    """The rows of one suite: a row for every method, budget and family of questions."""

    name: str
    rows: Sequence[Row]

    @property
    def title(self) -> str:
        """What it asks about."""
        return NAMES[self.name]

    @property
    def ratios(self) -> list[float]:
        """Budgets, largest first."""
        return sorted({r["keep_ratio"] for r in self.rows} - {1.0}, reverse=True)

    @property
    def methods(self) -> list[str]:
        """Methods in the order they ran, without the unpruned model."""
        return [m for m in dict.fromkeys(r["method"] for r in self.rows) if m != "unpruned"]

    @property
    def families(self) -> list[str]:
        """Families of questions."""
        return [f for f in dict.fromkeys(r["family"] for r in self.rows) if f != "overall"]

    def row(self, method: str, ratio: float, family: str = "overall") -> Row | None:
        """One row, None where that method has none at that budget."""
        wanted = (method, ratio, family)
        return next((r for r in self.rows if (r["method"], r["keep_ratio"], r["family"]) == wanted), None)

    def full(self, family: str = "overall") -> Row:
        """The unpruned model's row."""
        return next(r for r in self.rows if r["method"] == "unpruned" and r["family"] == family)

    def kept(self, method: str, ratio: float, family: str = "overall") -> float | None:
        """Percent of the unpruned accuracy, None where there is no row."""
        found = self.row(method, ratio, family)
        return None if found is None else float(found["percent_of_full"])

    def rivals(self, ratio: float) -> list[Row]:
        """Overall rows at one budget that our own method was compared with."""
        rows = (self.row(method, ratio) for method in self.methods if method != OURS)
        return [r for r in rows if r is not None and "ours_ahead" in r]

    def cell(self, method: str, ratio: float, family: str = "overall", *, interval: bool = False) -> str:
        """Percent of unpruned as a cell, empty where there is no row."""
        found = self.row(method, ratio, family)
        if found is None:
            return ""
        low, high = found["ci95"]
        return f"{found['percent_of_full']:.1f}" + (f" ({low:.0f}..{high:.0f})" if interval else "")

    def heads(self) -> list[str]:
        """The budgets as column heads."""
        return [share(r) for r in self.ratios]


def suites_of(report: Report) -> list[Suite]:
    """A report's suites, in the order of `NAMES`."""
    rows = report["rows"]
    return [Suite(name, own) for name in NAMES if (own := [r for r in rows if r["suite"] == name])]


def image_suite() -> Suite:
    """The suite of one image, which every page leads with."""
    return next(suite for suite in suites_of(load("accuracy")) if suite.name == "image")
