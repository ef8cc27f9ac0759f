"""What each experiment lets the model see, as rows of indices into one table of embeddings.

The table of an image is [everything from its first to its last visual token (n), ablation embedding (1), suffix embeddings
(s)]; a run is the row of table indices that follows the chat prefix. All functions here are pure; which experiment needs which
run is arXiv 2503.20540, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from codebook_schemas import UserError

WINDOW = 3


def grid_cells(position: Tensor) -> Tensor:
    """Index of the visual token in every grid cell: [rows, columns] long.

    Args:
        position: [n, 2] (row, column) of every visual token; (-1, -1) for separators, which fill no cell.

    Raises:
        UserError: the tokens do not fill one rectangular grid, each cell once.
    """
    own = torch.nonzero(position[:, 0] >= 0).flatten()
    place = position[own]
    shape = [0, 0] if len(own) == 0 else (place.max(0).values + 1).tolist()
    rows, columns = shape
    raster = place[:, 0] * columns + place[:, 1]
    if len(own) != rows * columns or len(own) == 0 or len(torch.unique(raster)) != len(own):
        raise UserError(
            f"the {len(own)} visual tokens of an image do not fill one {rows} x {columns} grid: this model cannot be probed"
        )
    return own[torch.argsort(raster)].view(rows, columns)


def grids(position: Tensor, frame: Tensor | None) -> list[Tensor]:
    """`grid_cells` of every grid of an image with several; indices count the tokens of all.

    Args:
        position: [n, 2] (row, column) of every visual token in its own grid.
        frame: [n], which grid that is; None: there is one.
    """
    frame = torch.zeros(len(position), dtype=torch.long) if frame is None else frame
    members = [torch.nonzero(frame == number).flatten() for number in torch.unique(frame)]
    return [mine[grid_cells(position[mine])] for mine in members]


def window_corners(rows: int, columns: int) -> Tensor:
    """Upper left cell of the window around each cell, shifted inward at borders: [rows * columns, 2] long."""
    cell = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
    last = torch.tensor([max(rows - WINDOW, 0), max(columns - WINDOW, 0)])
    return torch.minimum((cell - WINDOW // 2).clamp_min(0), last)


@dataclass(frozen=True)
class GlobalGroup:
    """Global runs that share everything before their first ablated token.

    member: indices into the list of distinct windows. start: visual tokens taken from the shared prefix. runs: [g, length].
    """

    member: Tensor
    start: int
    runs: Tensor


class ImageRuns:
    """The runs of one grid of an image. `tokens` are raster indices of its cells [m] long; results are table indices."""

    def __init__(self, cells: Tensor, count: int, suffix: int, ablation: Literal["replace", "drop"]) -> None:
        """Lay out a grid `cells` [rows, columns], table indices, of an image of `count` embeddings before `suffix` text tokens.

        What lies outside of the grid (separators, other grids, text between tiles) is seen by global runs only.
        """
        self._flat, self._count, self._ablation = cells.flatten(), count, ablation
        rows, columns = cells.shape
        corners = window_corners(rows, columns)
        down, right = torch.meshgrid(
            torch.arange(min(WINDOW, rows)), torch.arange(min(WINDOW, columns)), indexing="ij"
        )  # fmt: skip
        across = (corners[:, :1] + down.flatten()) * columns + corners[:, 1:] + right.flatten()
        self._windows = self._flat[across]
        self._corner_row = corners[:, 0]
        self._suffix = torch.arange(count + 1, count + 1 + suffix)

    def _finish(self, visual: Tensor) -> Tensor:
        return torch.cat([visual, self._suffix.expand(len(visual), -1)], dim=1)

    def _ablate(self, visual: Tensor, gone: Tensor) -> Tensor:
        """Rows [m, q] without the tokens `gone` [m, g]: [m, q] with the ablation embedding there, or [m, q - g]."""
        hit = (visual[:, :, None] == gone[:, None, :]).any(-1)
        if self._ablation == "replace":
            return visual.masked_fill(hit, self._count)
        return visual[~hit].view(len(visual), visual.shape[1] - gone.shape[1])

    def single(self, tokens: Tensor) -> Tensor:
        """One visual token alone: [m, 1 + s]."""
        return self._finish(self._flat[tokens][:, None])

    def distinct_windows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens at a border share their window with a neighbour: (one representative per window, index into it per token)."""
        first, inverse = torch.unique(self._windows[tokens, 0], return_inverse=True)
        representative = torch.empty(len(first), dtype=torch.long)
        representative[inverse] = tokens
        return representative, inverse

    def region(self, tokens: Tensor) -> Tensor:
        """The window around each token, raster order: [m, 9 + s]."""
        return self._finish(self._windows[tokens])

    def region_ablated(self, tokens: Tensor) -> Tensor:
        """The same with the token itself ablated: [m, 9 + s] or [m, 8 + s]."""
        return self._finish(self._ablate(self._windows[tokens], self._flat[tokens][:, None]))

    def whole(self) -> Tensor:
        """The full image: [1, n + s]."""
        return self._finish(torch.arange(self._count)[None])

    def global_ablated(self, tokens: Tensor) -> Iterator[GlobalGroup]:
        """The full image with each token's window ablated, grouped by the grid row the window starts in.

        Causal attention: nothing before the first ablated token changes, so a group begins there; within a group all
        runs have the same length.
        """
        for row in torch.unique(self._corner_row[tokens]).tolist():
            member = torch.nonzero(self._corner_row[tokens] == row).flatten()
            gone = self._windows[tokens[member]]
            start = int(gone.min())
            visual = torch.arange(start, self._count).expand(len(member), -1)
            yield GlobalGroup(member, start, self._finish(self._ablate(visual, gone)))
