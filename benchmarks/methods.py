"""Every pruning method the accuracy table compares, at a budget of layer-averaged visual tokens; a new one is one line.

Methods before layer 0 keep `ratio` of each image's tokens, with their original positions where the row says nothing else.
Methods inside the decoder let everything enter, so their schedule is solved for the same average over the layers; where no
schedule reaches it, the method has no row there.
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
    DivPrunePruner,
    FastVPruner,
    PoolPruner,
    PyramidPruner,
    RandomPruner,
    UniformPruner,
    VisionZipPruner,
)
from reference_vlm.scenes import GRID

SMALLER = "smaller picture"
"""The control that shrinks the picture instead: its images are drawn anew for every budget."""
STAGES = 4
"""PyramidDrop's stages of equal depth."""


@dataclass(frozen=True)
class Setting:
    """What a method needs to be made: the codebook, the budget, the decoder's depth and the seed."""

    codebook: Codebook
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


def pyramid(setting: Setting) -> Any:
    """PyramidDrop with the ratio whose average over four stages is the budget (arXiv 2410.17247)."""
    share = stage_ratio(setting.ratio)
    return None if share is None else PyramidPruner(ratio=share)


def stage_ratio(average: float) -> float | None:
    """The x in (0, 1] with (1 + x + x^2 + x^3) / 4 = `average`, or None: the first stage alone costs a quarter."""
    if average <= (1 + 0.01) / STAGES:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(STAGES)) / STAGES < average else (low, middle)
    return round(high, 6)


def codebook_pyramid(setting: Setting) -> Any:
    """The codebook, then PyramidDrop at its default ratio: the codebook keeps what makes the average the budget."""
    entering = setting.ratio / (sum(0.5**k for k in range(STAGES)) / STAGES)
    return None if entering >= 1 else CodebookPruner(setting.codebook, keep_ratio=round(entering, 6)) | PyramidPruner()


def smaller_picture(setting: Setting) -> Any:
    """Only what shows a picture shrunk to about the budget."""
    rows, columns = smaller_grid(setting.ratio * GRID * GRID)
    return CornerPruner(rows=rows, columns=columns)


METHODS: dict[str, Make] = {
    "random": lambda s: RandomPruner(keep_ratio=s.ratio, seed=s.seed, positions="original"),
    "uniform": lambda s: UniformPruner(keep_ratio=s.ratio, positions="original"),
    "pool": lambda s: PoolPruner(keep_ratio=s.ratio, positions="original"),
    SMALLER: smaller_picture,
    "FastV": fastv,
    "PyramidDrop": pyramid,
    "VisionZip": lambda s: VisionZipPruner(keep_ratio=s.ratio, positions="original"),
    "DivPrune": lambda s: DivPrunePruner(keep_ratio=s.ratio, positions="original"),
    "CDPruner": lambda s: CDPrunerPruner(keep_ratio=s.ratio, positions="original"),
    "codebook": lambda s: CodebookPruner(s.codebook, keep_ratio=s.ratio, positions="original"),
    OURS: lambda s: CodebookDiversityPruner(s.codebook, keep_ratio=s.ratio, positions="original"),
    "codebook, compact positions": lambda s: CodebookPruner(s.codebook, keep_ratio=s.ratio),
    "DivPrune, compact positions": lambda s: DivPrunePruner(keep_ratio=s.ratio),
    "codebook | pyramid": codebook_pyramid,
}
