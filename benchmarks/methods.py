"""Every pruning method the accuracy table compares, at a budget of layer-averaged visual tokens; a new one is one line.

Methods before layer 0 keep `ratio` of each image's tokens. Methods inside the decoder let everything enter, so their schedule
is solved for the same average over the layers; where no schedule reaches it, the method has no row there. Positions are
original where a row says nothing else, with two exceptions: the paper's own codebook method is run as published, and a smaller
picture is numbered as any picture of its size would be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """What a method needs to be made: the codebook, the budget, the decoder's depth, the seed and the paper's own codebook."""

    codebook: Codebook
    ratio: float
    layers: int
    seed: int
    paper: Codebook | None = None


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


def then_pyramid(first: type[CodebookPruner | CodebookDiversityPruner], setting: Setting) -> Any:
    """A method, then PyramidDrop at its default ratio: the first keeps what makes the average the budget."""
    entering = setting.ratio / (sum(0.5**k for k in range(STAGES)) / STAGES)
    if entering >= 1:
        return None
    return first(setting.codebook, keep_ratio=round(entering, 6), positions="original") | PyramidPruner(positions="original")


def ours(setting: Setting, positions: Positions = "original") -> Any:
    """Our own method."""
    return CodebookDiversityPruner(setting.codebook, keep_ratio=setting.ratio, positions=positions)


def paper_exact(setting: Setting) -> Any:
    """The published method, with the reference implementation's compact positions (arXiv 2503.20540)."""
    return setting.paper and CodebookPruner(setting.paper, keep_ratio=setting.ratio)


def smaller_picture(setting: Setting) -> Any:
    """Only what shows a picture shrunk to about the budget."""
    rows, columns = smaller_grid(setting.ratio * GRID * GRID)
    return CornerPruner(rows=rows, columns=columns)


QUESTION = 16
"""Tokens at the end of a prompt that hold its question and the template behind it."""
CONTEXT = ContextPruner(p=0.3, layers=2, protect_last=QUESTION)
"""Behind a long text: the paper's rate, its question kept."""
PICTURES = ("image", "images", "video")
ALL = (*PICTURES, "text")


@dataclass(frozen=True)
class Method:
    """How a method is made for a budget (None: it cannot meet it), and the suites it is compared on by default."""

    make: Make
    suites: tuple[str, ...] = PICTURES


METHODS: dict[str, Method] = {
    "random": Method(lambda s: RandomPruner(keep_ratio=s.ratio, seed=s.seed, positions="original"), ALL),
    "uniform": Method(lambda s: UniformPruner(keep_ratio=s.ratio, positions="original"), ALL),
    "pool": Method(lambda s: PoolPruner(keep_ratio=s.ratio, positions="original")),
    SMALLER: Method(smaller_picture),
    "FastV": Method(fastv, ALL),
    "PyramidDrop": Method(pyramid),
    "VisionZip": Method(lambda s: VisionZipPruner(keep_ratio=s.ratio, positions="original"), ALL),
    "DivPrune": Method(lambda s: DivPrunePruner(keep_ratio=s.ratio, positions="original"), ALL),
    "CDPruner": Method(lambda s: CDPrunerPruner(keep_ratio=s.ratio, positions="original"), ALL),
    "EVS": Method(lambda s: EVSPruner(keep_ratio=s.ratio, positions="original"), ("video",)),
    "codebook": Method(lambda s: CodebookPruner(s.codebook, keep_ratio=s.ratio, positions="original"), ALL),
    "codebook, paper-exact": Method(paper_exact),
    OURS: Method(ours, ALL),
    "codebook, compact positions": Method(lambda s: CodebookPruner(s.codebook, keep_ratio=s.ratio, positions="compact")),
    f"{OURS}, compact positions": Method(lambda s: ours(s, "compact")),
    "DivPrune, compact positions": Method(lambda s: DivPrunePruner(keep_ratio=s.ratio, positions="compact")),
    "PyramidDrop, compact positions": Method(lambda s: pyramid(s, "compact")),
    "codebook | pyramid": Method(lambda s: then_pyramid(CodebookPruner, s)),
    f"{OURS} | pyramid": Method(lambda s: then_pyramid(CodebookDiversityPruner, s), ALL),
    f"{OURS} | context": Method(lambda s: ours(s) | CONTEXT, ("text",)),
}


def positions_of(pruner: Any) -> str:
    """How a pruner, or a chain's members one after the other, number what they keep."""
    return " | ".join(dict.fromkeys(p.positions for p in (pruner.pruners if isinstance(pruner, PrunerChain) else (pruner,))))


def schedule_of(pruner: Any, layers: int) -> str:
    """What a pruner keeps from which of `layers` layers on, of what entered the first one of its chain's member."""
    if isinstance(pruner, PrunerChain):
        return " | ".join(schedule_of(p, layers) for p in pruner.pruners)
    if isinstance(pruner, CornerPruner):
        return f"{pruner.rows} x {pruner.columns} from layer 0"
    if isinstance(pruner, FastVPruner):
        return f"{pruner.keep_ratio:.4g} from layer {pruner.layer}"
    if isinstance(pruner, PyramidPruner):
        shares = zip(pruner.fractions, pruner.boundaries(layers), strict=True)
        return ", ".join(f"{float(share):.4g} from layer {layer}" for share, layer in shares)
    if isinstance(pruner, ContextPruner):
        return f"{pruner.p} of the text that is left goes in front of layers {', '.join(map(str, pruner.plan(layers)))}"
    return f"{pruner.keep_ratio:.4g} from layer 0"
