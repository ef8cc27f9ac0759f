"""The cascade of experiments on images of one layout, in batches that they share (arXiv 2503.20540, section 3).

Per token: its top-1 probability alone (single-input), how far its 3 x 3 neighbourhood's answer moves without it (region) and
how far the image's answer moves without that neighbourhood (global). Each experiment is one forward pass, read at the last
position; `runs` says what a pass sees, `forward` how passes share work, `divergence` what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_builder.costs import ProbeCounters
from codebook_builder.divergence import Candidates, top1_probability
from codebook_builder.forward import ReadOut, SharedPrefix
from codebook_builder.memory import ran_out
from codebook_builder.runs import ImageRuns, Probed, Runs, Table
from codebook_builder.scores import Floats
from codebook_schemas import ProbeConfig

Grid = tuple[ImageRuns, Probed]
"""The runs of a grid, and which of its tokens to probe."""


@dataclass(frozen=True)
class AlikeImages:
    """Images with one layout: the text before them and how many positions of that count, and the table of their embeddings
    (see `runs`)."""

    count: int
    chat: SharedPrefix | None
    length: int
    table: Table


class Experiments:
    """Runs the experiments of some images and counts them."""

    def __init__(
        self,
        images: AlikeImages,
        read: ReadOut,
        config: ProbeConfig,
        thresholds: tuple[float, float] | None,
        counters: ProbeCounters,
    ) -> None:
        """`thresholds`: (top-1 probability, influence) of the cascade; None runs everything."""
        self._images, self._read, self._config, self._counters = images, read, config, counters
        self._thresholds = thresholds

    def scores(self, grids: Sequence[Grid]) -> list[Floats]:
        """Top-1 probability, region and global divergence [3, m] float32 of every grid, NaN where not computed.

        An experiment is run only where the ones before it leave the outcome open. Low-information asks top1 < t_p and J < t_j;
        J adds two divergences that are never negative. So top1 >= t_p settles a token, and so does the region's share of J
        alone once it reaches t_j.
        """
        found = [self._within(*grid) for grid in grids]
        left = [(runs, probed[torch.from_numpy(open_)]) for (runs, probed), (_, open_) in zip(grids, found, strict=True)]
        for (scores, open_), moved in zip(found, self._global(left), strict=True):
            scores[2, open_] = moved
            for kind, row in zip((self._counters.single, self._counters.region, self._counters.global_), scores, strict=True):
                kind.add(len(row), int((~np.isnan(row)).sum()))
        return [scores for scores, _ in found]

    def _within(self, runs: ImageRuns, probed: Probed) -> tuple[Floats, NDArray[np.bool_]]:
        """Scores [3, m] of a grid without the last row, and which tokens that is to be computed for."""
        count = len(probed)
        scores = np.full((3, count), np.nan, dtype=np.float32)
        scores[0] = self._single(runs, probed)
        open_ = np.ones(count, dtype=bool)
        if self._thresholds is not None:
            open_ = scores[0] < np.float64(self._thresholds[0])
        if open_.any():
            scores[1, open_] = self._region(runs, probed[torch.from_numpy(open_)])
        if self._thresholds is not None:
            open_ &= scores[1].astype(np.float64) * self._config.region_weight < self._thresholds[1]
        return scores, open_

    def _logits(self, runs: Runs) -> Iterator[tuple[slice, Tensor]]:
        return self._read.logits(self._images.chat, self._images.length, self._images.table, runs)

    def _single(self, runs: ImageRuns, probed: Probed) -> Floats:
        top1 = torch.empty(len(probed), device=self._images.table.embeddings.device)
        for rows, logits in self._logits(runs.single(probed)):
            top1[rows] = top1_probability(logits, self._config.top_k_single)
        return _floats(top1)

    def _region(self, runs: ImageRuns, probed: Probed) -> Floats:
        representative, window = runs.distinct_windows(probed)
        k, device = self._config.top_k_divergence, self._images.table.embeddings.device
        answers = self._logits(runs.region(representative))
        reference = Candidates.join([Candidates.of(logits, k) for _, logits in answers])
        window = window.to(device, non_blocking=True)
        moved = torch.empty(len(probed), device=device)
        for rows, logits in self._logits(runs.region_ablated(probed)):
            moved[rows] = reference[window[rows]].divergence(logits, self._config.divergence)
        return _floats(moved)

    def _global(self, grids: Sequence[Grid]) -> list[Floats]:
        """Of as many images at a time as make one batch in full: the keys and values of these are held."""
        moved = [np.empty(len(probed), np.float32) for _, probed in grids]
        whole = grids[0][0].whole(torch.unique(torch.cat([probed.image for _, probed in grids])))
        at_once = max(1, self._read.budget // whole.index.shape[1])
        for part in whole.split(math.ceil(len(whole.index) / at_once)) if len(whole.index) else ():
            self._of_images(part, grids, moved)
        return moved

    def _of_images(self, whole: Runs, grids: Sequence[Grid], moved: Sequence[Floats]) -> None:
        """Fill in the tokens of some images, of fewer at a time where memory does not suffice; see `ReadOut.logits`."""
        shape = (self._images.length, *whole.index.shape)
        if not self._read.is_too_large(shape):
            try:
                mine = [torch.isin(probed.image, whole.image) for _, probed in grids]
                found = self._ablated(whole, [(runs, probed[own]) for (runs, probed), own in zip(grids, mine, strict=True)])
                for scores, own, part in zip(moved, mine, found, strict=True):
                    scores[own.numpy()] = part
            except RuntimeError as error:
                if len(whole.index) == 1 or not ran_out(error):
                    raise
            else:
                return
            self._read.give_up(shape)
        for half in whole.split(2):
            self._of_images(half, grids, moved)

    def _ablated(self, whole: Runs, grids: Sequence[Grid]) -> Iterator[Floats]:
        """One run of each whole image fills the cache that its ablated runs start from."""
        images, read = self._images, self._read
        prefix, answers = read.extend(images.chat, images.length, images.table, whole)
        reference = Candidates.of(answers, self._config.top_k_divergence)
        row = torch.empty(images.count, dtype=torch.long).index_copy(0, whole.image, torch.arange(len(whole.image)))
        for runs, probed in grids:
            representative, window = runs.distinct_windows(probed)
            moved, member = [answers.new_empty(0, dtype=torch.float32)], [window[:0]]
            for group in runs.global_ablated(representative):
                cached = replace(group.runs, image=row[group.runs.image])
                of = cached.image.to(answers.device, non_blocking=True)
                for rows, logits in read.logits(prefix, images.length + group.start, images.table, cached):
                    moved.append(reference[of[rows]].divergence(logits, self._config.divergence))
                    member.append(group.member[rows])
            yield _floats(torch.cat(moved))[torch.cat(member).argsort()[window].numpy()]


def _floats(values: Tensor) -> Floats:
    """For `ImageScores`, where NaN stands for what was not computed: what was computed and is NaN becomes infinite."""
    found: Floats = values.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).cpu().numpy()
    return found
