"""What each experiment lets the model see, as rows of indices into one table of embeddings.

The table of an image is [everything from its first to its last visual token (n), ablation embedding (1), suffix embeddings
(s), prefix embeddings (p)]; those of images with one layout stand one behind the other. A run is the row of table indices that
follows the chat prefix; where nothing can be shared, every run begins with the prefix itself. All functions here are pure;
which experiment needs which run is arXiv 2503.20540, sections 3.1 and 3.2.
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
    position, as M-RoPE numbers text, an image of the cells shown, and text behind it; for families that place tokens so. image:
    [m] long, the number of the image each run is of."""

    index: Tensor
    place: Tensor
    image: Tensor

    def to(self, device: torch.device) -> Runs:
        """The runs on another device."""
        return Runs(*(t.to(device, non_blocking=True) for t in (self.index, self.place, self.image)))

    def split(self, parts: int) -> list[Runs]:
        """So many groups, as equal as can be, in order."""
        groups = (t.tensor_split(parts) for t in (self.index, self.place, self.image))
        return [Runs(*group) for group in zip(*groups, strict=True)]


def text_runs(length: int) -> Runs:
    """One run over the first rows of a table, all of them text at the beginning: [1, length]."""
    index = torch.arange(length)[None]
    return Runs(index, index.unsqueeze(-1).expand(-1, -1, 3), torch.zeros(1, dtype=torch.long))


@dataclass(frozen=True)
class Probed:
    """Visual tokens to probe. image: [m] long, number of the image each is in. cell: [m] long, its raster index in the grid."""

    image: Tensor
    cell: Tensor

    def __len__(self) -> int:
        return len(self.cell)

    def __getitem__(self, rows: Tensor) -> Probed:
        return Probed(self.image[rows], self.cell[rows])


@dataclass(frozen=True)
class GlobalGroup:
    """Global runs with one number of tokens before the first ablated one.

    member: indices into the list of distinct windows. start: tokens taken from the image's own prefix. runs: of g windows.
    """

    member: Tensor
    start: int
    runs: Runs


class ImageRuns:
    """The runs of one grid of an image, or of that grid in several images with the same layout."""

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
        self._size = count + 1 + suffix + before

    def _finish(self, image: Tensor, visual: Tensor, cell: Tensor, gone: Tensor | None = None) -> Runs:
        """Rows [m, q] of images with the suffix behind them.

        Args:
            image: [m], the image of each run.
            visual: [m, q] indices in the table of one image.
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
        place = torch.cat([ahead, torch.cat([place, behind], 1) + self._before], 1)
        return Runs(index + image[:, None] * self._size, place, image)

    def single(self, probed: Probed) -> Runs:
        """One visual token alone: [m, 1 + s]."""
        return self._finish(probed.image, self._flat[probed.cell][:, None], torch.zeros(1, 1, 2, dtype=torch.long))

    def distinct_windows(self, probed: Probed) -> tuple[Probed, Tensor]:
        """Tokens at a border share their window with a neighbour: (one token per window, index into them per token)."""
        first, inverse = torch.unique(probed.image * self._count + self._windows[probed.cell, 0], return_inverse=True)
        representative = torch.empty(len(first), dtype=torch.long)
        representative[inverse] = torch.arange(len(probed))
        return probed[representative], inverse

    def region(self, probed: Probed) -> Runs:
        """The window around each token, raster order: [m, 9 + s]."""
        return self._finish(probed.image, self._windows[probed.cell], self._window[None])

    def region_ablated(self, probed: Probed) -> Runs:
        """The same with the token itself ablated: [m, 9 + s] or [m, 8 + s]."""
        own = self._flat[probed.cell][:, None]
        return self._finish(probed.image, self._windows[probed.cell], self._window[None], own)

    def whole(self, image: Tensor) -> Runs:
        """These images in full: [m, n + s]."""
        return self._finish(image, torch.arange(self._count).expand(len(image), -1), self._cell[None])

    def global_ablated(self, probed: Probed) -> Iterator[GlobalGroup]:
        """The full image with each token's window ablated, grouped by the grid row the window starts in.

        Causal attention: nothing before the first ablated token changes, so a group begins there; within a group all
        runs have the same length. Where image tokens see each other it begins with the image.
        """
        rows = self._corner_row[probed.cell]
        for row in torch.unique(rows).tolist():
            member = torch.nonzero(rows == row).flatten()
            mine = probed[member]
            gone = self._windows[mine.cell]
            start = 0 if self._apart else int(gone.min())
            visual = torch.arange(start, self._count).expand(len(member), -1)
            yield GlobalGroup(member, start, self._finish(mine.image, visual, self._cell[None, start:], gone))
