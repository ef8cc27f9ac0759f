"""Budgets: which visual tokens of an image stay, given their redundancy scores. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache

import torch
from torch import Tensor

from codebook_schemas import UserError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What stays of every image or video; exactly one of `keep_tokens`, `keep_ratio` and `threshold` is given.

    keep_tokens: tokens kept of each image (video), or one number an image (a tuple); one with fewer tokens keeps them all. Of a
    video's frames, or the crops of an image, each keeps its share.
    keep_ratio: fraction kept, in (0, 1]; of n tokens, ratio * n rounded half up in decimal arithmetic (0.145 of 100 is 15).
    threshold: tokens with a score below it stay (arXiv 2503.20540 keeps tokens whose similarity to the codebook is lower).
    min_keep: tokens of every image (with a threshold: of every frame or crop) that stay whatever the scores say.

    Raises:
        UserError: none or several of the three are given, or a value is out of range.
    """

    keep_tokens: int | tuple[int, ...] | None = None
    keep_ratio: float | None = None
    threshold: float | None = None
    min_keep: int = 1

    def __post_init__(self) -> None:
        given = [name for name in ("keep_tokens", "keep_ratio", "threshold") if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(given) + " contradict each other" if given else "no budget"
            raise UserError(f"{what}: give exactly one of keep_tokens, keep_ratio and threshold")
        if not _is_count(self.min_keep):
            raise UserError(f"min_keep must be a whole number >= 1, not {self.min_keep!r}")
        if self.keep_tokens is not None:
            self._check_keep_tokens()
        for name in ("keep_ratio", "threshold"):
            value = getattr(self, name)
            number = isinstance(value, float | int) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value)):
                raise UserError(f"{name} must be a finite number, not {value!r}")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise UserError(f"keep_ratio is the fraction kept, in (0, 1]; {self.keep_ratio!r} is not")

    def _check_keep_tokens(self) -> None:
        values = self.keep_tokens if isinstance(self.keep_tokens, tuple) else (self.keep_tokens,)
        if not values or not all(_is_count(value) for value in values):
            raise UserError(f"keep_tokens must be a whole number >= 1, or a tuple of them, not {self.keep_tokens!r}")
        if min(value for value in values if value is not None) < self.min_keep:
            raise UserError(f"keep_tokens {self.keep_tokens!r} is less than min_keep {self.min_keep}: lower min_keep")

    def count(self, tokens: int, keep_tokens: int | None = None) -> int | None:
        """How many of an image's `tokens` stay; None for a threshold, where it depends on the scores.

        Args:
            tokens: tokens of the image that may be dropped.
            keep_tokens: this image's own number, where the budget holds one an image.
        """
        if self.threshold is not None:
            return None
        if self.keep_ratio is not None:
            wanted = _rounded(float(self.keep_ratio), tokens)
        else:
            wanted = keep_tokens if keep_tokens is not None else _single(self.keep_tokens)
        return min(tokens, max(wanted, self.min_keep))

    def mask(self, scores: Tensor, keep_tokens: int | None = None) -> Tensor:
        """Keep mask of one image.

        Args:
            scores: [n] redundancy, higher = drop. NaN counts as the highest.
            keep_tokens: see `count`.

        Returns:
            [n] bool, True = kept. Of equal scores the token of lowest index stays first.
        """
        count = self.count(len(scores), keep_tokens)
        keep = lowest(scores, self.min_keep if count is None else count)
        return keep if self.threshold is None else keep | (scores < self.threshold)

    def per_image(self, rows: Sequence[int], prompts: Tensor) -> list[int | None]:
        """`keep_tokens` of every image of a call, None where all images share one budget.

        `generate` repeats every prompt for its beams or returned sequences; the budgets are repeated with it.

        Args:
            rows: the batch row of every image, ascending.
            prompts: [batch, columns] long, the token ids of the call's rows, by which repeated prompts are known.

        Raises:
            UserError: the tuple has not one number for each image.
        """
        if not isinstance(self.keep_tokens, tuple):
            return [None] * len(rows)
        origin = sources(rows, len(prompts), len(self.keep_tokens))
        if origin is None or not _repeated(prompts, len(rows) // len(self.keep_tokens)):
            raise UserError(f"keep_tokens has {len(self.keep_tokens)} numbers for {len(rows)} images: give one for each image")
        return [self.keep_tokens[image] for image in origin]


def _repeated(prompts: Tensor, copies: int) -> bool:
    """Whether every row of [batch, columns] stands there `copies` times in a row."""
    groups = prompts.view(-1, copies, prompts.shape[1])
    return bool((groups == groups[:, :1]).all())


def sources(rows: Sequence[int], batch: int, given: int) -> list[int] | None:
    """Which of the `given` images each image of a call is, where `generate` repeated every prompt for its beams.

    Args:
        rows: the batch row of every image, ascending.
        batch: rows of the call.
        given: images before the repetition.

    Returns:
        Their numbers, or None when the images cannot be copies of that many.
    """
    copies = len(rows) // given
    if copies * given != len(rows) or batch % max(copies, 1):
        return None
    places = [(row // copies, j - rows.index(row)) for j, row in enumerate(rows)]
    number = {place: i for i, place in enumerate(sorted(set(places)))}
    return [number[place] for place in places] if len(number) == given else None


def lowest(scores: Tensor, count: int) -> Tensor:
    """[n] bool: the `count` lowest of `scores` [n]; of equal ones the lower index, NaN last."""
    keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    return keep.index_fill_(0, torch.argsort(scores, stable=True)[:count], True)


def shares(count: int, lengths: Sequence[int]) -> list[int]:
    """`count` tokens spread over frames in proportion to their `lengths`: rounded down, then the largest remainders first."""
    total = sum(lengths)
    found = [count * length // total for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-(count * lengths[i] % total), i))
    for i in order[: count - sum(found)]:
        found[i] += 1
    return found


@lru_cache(maxsize=1024)
def _rounded(ratio: float, tokens: int) -> int:
    return int((Decimal(repr(ratio)) * tokens).to_integral_value(ROUND_HALF_UP))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _single(value: int | tuple[int, ...] | None) -> int:
    if not isinstance(value, int):
        raise UserError("keep_tokens holds one number an image: say which image's it is")
    return value
