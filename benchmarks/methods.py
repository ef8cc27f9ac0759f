"""Every pruning method the accuracy table compares, at a budget of layer-averaged visual tokens; a new one is one line.

Methods before layer 0 keep `ratio` of each image's tokens, with their original positions where the row says nothing else.
Methods inside the decoder let everything enter, so their schedule is solved for the same average over the layers; where no
schedule reaches it, the method has no row there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from benchmarks import OURS
from benchmarks.downsample import CornerPruner, smaller_grid
from codebook_prune import (
    CDPrunerPruner,
    Codebook,
    CodebookDiversityPruner,
    CodebookPruner,
    ContextPruner,
    DivPrunePruner,
    EVSPruner,
    FastVPruner,
    PoolPruner,
    PyramidPruner,
    RandomPruner,
    UniformPruner,
    VisionZipPruner,
)
from codebook_prune.pruners.base import Positions, PrunerChain
from reference_vlm.scenes import GRID

SMALLER = "smaller picture"
"""The control that shrinks the picture instead: its images are drawn anew for every budget."""
STAGES = 4
"""PyramidDrop's stages of equal depth."""


@dataclass(frozen=True)
class Setting:
    """What a method needs to be made: the codebook as the project builds it and with the published selection, the budget, the
    decoder's depth and the seed."""

    codebook: Codebook
    published: Codebook
    ratio: float
    layers: int
    seed: int


Make = Callable[[Setting], Any]


def fastv(setting: Setting) -> Any:
    """FastV after two layers, or after one where two already cost more than the budget (arXiv 2403.06764)."""
    for layer in (2, 1):
        kept = (setting.ratio * setting.layers - layer) / (setting.layers - layer)
        if kept > 0:
            return FastVPruner(layer=layer, keep_ratio=round(kept, 6))
    return None


def pyramid(setting: Setting, positions: Positions = "original") -> Any:
    """PyramidDrop with the ratio whose average over four stages is the budget (arXiv 2410.17247)."""
    share = stage_ratio(setting.ratio)
    return None if share is None else PyramidPruner(ratio=share, positions=positions)


def stage_ratio(average: float) -> float | None:
    """The x in (0, 1] with (1 + x + x^2 + x^3) / 4 = `average`, or None: the first stage alone costs a quarter."""
    if average <= (1 + 0.01) / STAGES:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(STAGES)) / STAGES < average else (low, middle)
    return round(high, 6)


def then_pyramid(setting: Setting, first: type[CodebookPruner | CodebookDiversityPruner]) -> Any:
    """A codebook pruner, then PyramidDrop at its default ratio: the first keeps what makes the average the budget."""
    entering = setting.ratio / (sum(0.5**k for k in range(STAGES)) / STAGES)
    if entering >= 1:
        return None
    before = first(setting.codebook, keep_ratio=round(entering, 6), positions="original")
    return before | PyramidPruner(positions="original")


def then_context(setting: Setting) -> Any:
    """Ours, then half of the text in two steps, its question spared (arXiv 2410.19732)."""
    before = CodebookDiversityPruner(setting.codebook, keep_ratio=setting.ratio, positions="original")
    return before | ContextPruner(p=0.3, layers=2, protect_last=QUESTION)


def smaller_picture(setting: Setting) -> Any:
    """Only what shows a picture shrunk to about the budget."""
    rows, columns = smaller_grid(setting.ratio * GRID * GRID)
    return CornerPruner(rows=rows, columns=columns)


QUESTION = 16
"""Tokens at the end of a prompt that hold its question and the template behind it."""
METHODS: dict[str, Make] = {
    "random": lambda s: RandomPruner(keep_ratio=s.ratio, seed=s.seed, positions="original"),
    "uniform": lambda s: UniformPruner(keep_ratio=s.ratio, positions="original"),
    "pool": lambda s: PoolPruner(keep_ratio=s.ratio, positions="original"),
    SMALLER: smaller_picture,
    "FastV": fastv,
    "PyramidDrop": pyramid,
    "EVS": lambda s: EVSPruner(keep_ratio=s.ratio, positions="original"),
    "VisionZip": lambda s: VisionZipPruner(keep_ratio=s.ratio, positions="original"),
    "DivPrune": lambda s: DivPrunePruner(keep_ratio=s.ratio, positions="original"),
    "CDPruner": lambda s: CDPrunerPruner(keep_ratio=s.ratio, positions="original"),
    "codebook": lambda s: CodebookPruner(s.codebook, keep_ratio=s.ratio, positions="original"),
    OURS: lambda s: CodebookDiversityPruner(s.codebook, keep_ratio=s.ratio, positions="original"),
    "codebook, published selection, compact positions": lambda s: CodebookPruner(s.published, keep_ratio=s.ratio),
    "codebook, compact positions": lambda s: CodebookPruner(s.codebook, keep_ratio=s.ratio),
    f"{OURS}, compact positions": lambda s: CodebookDiversityPruner(s.codebook, keep_ratio=s.ratio, positions="compact"),
    "DivPrune, compact positions": lambda s: DivPrunePruner(keep_ratio=s.ratio),
    "PyramidDrop, compact positions": lambda s: pyramid(s, "compact"),
    "codebook | pyramid": lambda s: then_pyramid(s, CodebookPruner),
    f"{OURS} | pyramid": lambda s: then_pyramid(s, CodebookDiversityPruner),
    f"{OURS} | context": then_context,
}
"""Row -> its pruner, None where no schedule reaches the budget. Positions are the tokens' own where the row says nothing."""
ONE_SUITE = {"EVS": "video", f"{OURS} | context": "text"}
"""Rows of one suite only."""
LONG = ("random", "uniform", "FastV", "VisionZip", "DivPrune", "CDPruner", "codebook", OURS, f"{OURS} | context")
"""Rows of the suite of long texts, where an answer takes ten times as long."""


def rows_of_suite(suite: str, names: Sequence[str]) -> list[str]:
    """Which of the rows `names` a suite has."""
    return [n for n in names if ONE_SUITE.get(n, suite) == suite and (suite != "text" or n in LONG)]


def described(pruner: Any) -> str:
    """All that decides what a pruner does, the same in every process: its fields, codebooks by what is in them."""
    if isinstance(pruner, PrunerChain):
        return " | ".join(map(described, pruner.pruners))
    values = {f.name: getattr(pruner, f.name) for f in fields(pruner) if f.init}
    shown = (f"{k}={_content(v) if isinstance(v, Codebook) else repr(v)}" for k, v in values.items())
    return f"{type(pruner).__name__}({', '.join(shown)})"


def _content(codebook: Codebook) -> str:
    return codebook.manifest.files["prototypes.safetensors"].sha256


def schedule(pruner: Any) -> str:
    """Where a pruner drops what, in a few words, and how it numbers positions: for the table."""
    if isinstance(pruner, PrunerChain):
        return " | ".join(map(schedule, pruner.pruners))
    names = ("keep_ratio", "layer", "ratio", "p", "layers", "protect_last", "positions")
    found = {name: value for name in names if (value := getattr(pruner, name, None)) is not None}
    return ", ".join(f"{name} {value}" for name, value in found.items())
