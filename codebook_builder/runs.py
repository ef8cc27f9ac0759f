"""What each experiment lets the model see, as rows of indices into one table of embeddings.

The table of an image is [everything from its first to its last visual token (n), ablation embedding (1), suffix embeddings
(s)]; a run is the row of table indices that follows the chat prefix. Where nothing can be shared the table ends with the prefix
itself, and every run begins with it. All functions here are pure; which experiment needs which
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
class Table:
    """The vectors runs are made of. embeddings: [t, d]. features: [t, k, d] what is added to each behind the first k decoder
    layers (`VisualTokens.layer_features`), zeros for text and ablated tokens; None in families without. visual: [t] bool, which
    stand in an image's place, the ablation embedding too; None where the decoder does not ask."""

    embeddings: Tensor
    features: Tensor | None = None
    visual: Tensor | None = None


@dataclass(frozen=True)
class Runs:
    """Sequences of equal length. index: [m, q] long, rows of the table. place: [m, q, 3] long, time, height and width of each
    position, as M-RoPE numbers text, an image of the cells shown, and text behind it; for families that place tokens so."""

    index: Tensor
    place: Tensor

    def to(self, device: torch.device) -> Runs:
        """The runs on another device."""
        return Runs(self.index.to(device, non_blocking=True), self.place.to(device, non_blocking=True))

    def split(self, parts: int) -> list[Runs]:
        """So many groups, as equal as can be, in order."""
        pairs = zip(self.index.tensor_split(parts), self.place.tensor_split(parts), strict=True)
        return [Runs(*pair) for pair in pairs]


def text_runs(length: int) -> Runs:
    """One run over the first rows of a table, all of them text at the beginning: [1, length]."""
    index = torch.arange(length)[None]
    return Runs(index, index.unsqueeze(-1).expand(-1, -1, 3))


@dataclass(frozen=True)
class GlobalGroup:
    """Global runs that share everything before their first ablated token.

    member: indices into the list of distinct windows. start: visual tokens taken from the shared prefix. runs: of g windows.
    """

    member: Tensor
    start: int
    runs: Runs


class ImageRuns:
    """The runs of one grid of an image. `tokens` are raster indices of its cells [m] long."""

    def __init__(
        self, cells: Tensor, count: int, before: int, suffix: int, ablation: Literal["replace", "drop"], apart: bool = False
    ) -> None:
        """Lay out a grid `cells` [rows, columns], table indices, of an image of `count` embeddings.

        It stands behind `before` text tokens, which are in the shared prefix (`apart`: in every run, and nothing is shared),
        and in front of `suffix` others. What lies outside of the grid (separators, other grids, text between tiles) is seen
        by global runs only.
        """
        self._apart, self._lead = apart, torch.arange(before if apart else 0) + count + 1 + suffix
        self._flat, self._count, self._ablation = cells.flatten(), count, ablation
        rows, columns = cells.shape
        corners = window_corners(rows, columns)
        down, right = torch.meshgrid(
            torch.arange(min(WINDOW, rows)), torch.arange(min(WINDOW, columns)), indexing="ij"
        )  # fmt: skip
        across = (corners[:, :1] + down.flatten()) * columns + corners[:, 1:] + right.flatten()
        self._windows = self._flat[across]
        self._corner_row = corners[:, 0]
        self._window = torch.stack([down.flatten(), right.flatten()], 1)
        self._cell = torch.zeros(count, 2, dtype=torch.long)
        self._cell[self._flat] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
        self._before, self._suffix = before, torch.arange(count + 1, count + 1 + suffix)

    def _finish(self, visual: Tensor, cell: Tensor, gone: Tensor | None = None) -> Runs:
        """Rows [m, q] of the image with the suffix behind them.

        Args:
            visual: [m, q] table indices.
            cell: [m or 1, q, 2], row and column of each in the grid that is shown.
            gone: [m, g] table indices to ablate: the ablation embedding in their place, or rows of q - g.
        """
        side = int(cell.max()) + 1
        place = torch.cat([torch.zeros_like(cell[..., :1]), cell], -1).expand(len(visual), -1, -1)
        if gone is not None:
            hit = (visual[:, :, None] == gone[:, None, :]).any(-1)
            if self._ablation == "replace":
                visual = visual.masked_fill(hit, self._count)
            else:
                left = (len(visual), visual.shape[1] - gone.shape[1])
                visual, place = visual[~hit].view(left), place[~hit].view(*left, 3)
        behind = torch.arange(side, side + len(self._suffix))[:, None].expand(len(visual), -1, 3)
        index = torch.cat([x.expand(len(visual), -1) for x in (self._lead, visual, self._suffix)], dim=1)
        ahead = torch.arange(len(self._lead))[:, None].expand(len(visual), -1, 3)
        return Runs(index, torch.cat([ahead, torch.cat([place, behind], 1) + self._before], 1))

    def single(self, tokens: Tensor) -> Runs:
        """One visual token alone: [m, 1 + s]."""
        return self._finish(self._flat[tokens][:, None], torch.zeros(1, 1, 2, dtype=torch.long))

    def distinct_windows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens at a border share their window with a neighbour: (one representative per window, index into it per token)."""
        first, inverse = torch.unique(self._windows[tokens, 0], return_inverse=True)
        representative = torch.empty(len(first), dtype=torch.long)
        representative[inverse] = tokens
        return representative, inverse

    def region(self, tokens: Tensor) -> Runs:
        """The window around each token, raster order: [m, 9 + s]."""
        return self._finish(self._windows[tokens], self._window[None])

    def region_ablated(self, tokens: Tensor) -> Runs:
        """The same with the token itself ablated: [m, 9 + s] or [m, 8 + s]."""
        return self._finish(self._windows[tokens], self._window[None], self._flat[tokens][:, None])

    def whole(self) -> Runs:
        """The full image: [1, n + s]."""
        return self._finish(torch.arange(self._count)[None], self._cell[None])

    def global_ablated(self, tokens: Tensor) -> Iterator[GlobalGroup]:
        """The full image with each token's window ablated, grouped by the grid row the window starts in.

        Causal attention: nothing before the first ablated token changes, so a group begins there; within a group all
        runs have the same length. Where image tokens see each other it begins with the image.
        """
        for row in torch.unique(self._corner_row[tokens]).tolist():
            member = torch.nonzero(self._corner_row[tokens] == row).flatten()
            gone = self._windows[tokens[member]]
            start = 0 if self._apart else int(gone.min())
            visual = torch.arange(start, self._count).expand(len(member), -1)
            yield GlobalGroup(member, start, self._finish(visual, self._cell[None, start:], gone))
