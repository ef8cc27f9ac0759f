"""What every pruning method is: before layer 0 a score and a budget, inside the decoder layers and what stays there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.budget import Budget, lowest, shares
from codebook_prune.layer_view import LayerView
from codebook_prune.stats import PruneStats
from codebook_prune.visual_tokens import Kept, VisualTokens
from codebook_schemas import UserError

Positions = Literal["compact", "original"]
Attention = Literal["previous", "next"]


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """A pruning method that drops visual tokens before decoder layer 0. A new one is one file with one `score`, or with one
    `select` where a token's worth depends on which others stay.

    `with pruner(model): ...` prunes every call of the model inside the block and leaves the model as it was. The budget is
    described in `Budget`. `positions`: "compact" renumbers the kept sequence without gaps, "original" keeps every token's own
    number (grounding needs it, arXiv 2506.21873); with M-RoPE both keep every token's place in the image. `stats` tells what
    was done since the block was entered.

    Raises:
        UserError: no budget, a contradictory one, a threshold for a method without scores, or an unknown position policy.
    """

    sees_text: ClassVar[bool] = False
    """Whether `VisualTokens.text` is filled in: then what is kept depends on the question."""

    sees_encoder: ClassVar[bool] = False
    """Whether `VisualTokens.encoder` is filled in; models whose encoder cannot be read are refused."""

    by_prompt: ClassVar[bool] = False
    """Whether `keep_each` is called with one prompt's items at a time: then what is kept of one may depend on the others."""

    keep_tokens: int | tuple[int, ...] | None = None
    keep_ratio: float | None = None
    threshold: float | None = None
    min_keep: int = 1
    positions: Positions = "compact"
    stats: PruneStats = field(default_factory=PruneStats, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _ = self.budget
        if self.threshold is not None and type(self).score is Pruner.score:
            raise UserError(f"{type(self).__name__} has no score to put a threshold on: give keep_tokens or keep_ratio")
        _check_positions(self.positions)

    @cached_property
    def budget(self) -> Budget:
        """The four budget fields, checked."""
        return Budget(
            keep_tokens=self.keep_tokens, keep_ratio=self.keep_ratio, threshold=self.threshold, min_keep=self.min_keep
        )

    def score(self, tokens: VisualTokens) -> Tensor:
        """Redundancy of the tokens of ONE grid (an image, one of its crops, a video's frame): [n], higher = dropped first.

        `tokens` holds no newline embeddings, and in a chain only what earlier pruners kept; `cls_similarity` is None.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a score or a select")

    def select(self, images: Sequence[VisualTokens], count: int | None) -> Tensor:
        """Which tokens stay of images of equally many: [images, n] bool. Default: those of lowest `score`.

        Args:
            images: what `score` is given, of one or more images of n tokens each.
            count: how many of each stay, 1 to n - 1; None: the budget is a threshold, which only methods with a `score` have.
        """
        masks = []
        for tokens in images:
            scores = self.score(tokens)
            if scores.shape != (len(tokens.embeddings),):
                raise ValueError(
                    f"{type(self).__name__}.score returned {list(scores.shape)} for {len(tokens.embeddings)} tokens"
                )
            masks.append(self.budget.mask(scores) if count is None else lowest(scores, count))
        return torch.stack(masks)

    def merge(self, images: Sequence[VisualTokens], kept: Tensor) -> Tensor | None:
        """New embeddings of the tokens that stay, for methods that put what goes into them. Default: None, as they are.

        Args:
            images: what `select` was given.
            kept: [images, n] bool, what it returned: equally many in each row.

        Returns:
            [images, kept tokens, d] in the order of the kept tokens, or None.
        """
        del images, kept
        return None

    def check(self, adapter: VLMAdapter) -> None:
        """Refuse a model this pruner cannot serve (raises UserError); called when a block is entered. Default: none."""
        del adapter

    def keep(self, tokens: VisualTokens, keep_tokens: int | None = None) -> Tensor | None:
        """Keep mask [n] bool of one image or video: `keep_each` without its embeddings."""
        kept = self.keep_each([tokens], [keep_tokens])[0]
        return None if kept is None else kept.mask

    def keep_each(self, items: Sequence[VisualTokens], limits: Sequence[int | None]) -> list[Kept | None]:
        """What stays of every image or video, None where the budget holds all its tokens (nothing is scored then).

        A video's frames, and the crops or tiles of an image, are chosen from one by one; each has its share of the item's
        budget. Those of equal sizes and shares, of all items, go through `select` together.

        Args:
            items: their tokens, without newlines.
            limits: each one's own `keep_tokens`, where the budget holds one an item.
        """
        grids: list[tuple[VisualTokens, int | None]] = []
        owners: list[int] = []
        for number, (tokens, limit) in enumerate(zip(items, limits, strict=True)):
            n = len(tokens.embeddings)
            if (count := self.budget.count(n, limit)) != n:
                frames = tokens.frames()
                lengths = [len(frame.embeddings) for frame in frames]
                grids += zip(frames, [None] * len(frames) if count is None else shares(count, lengths), strict=True)
                owners += [number] * len(frames)
        found = self._keep_grids(grids)
        parts = [[kept for owner, kept in zip(owners, found, strict=True) if owner == number] for number in range(len(items))]
        return [Kept.joined(part, item) if part else None for part, item in zip(parts, items, strict=True)]

    def _keep_grids(self, grids: Sequence[tuple[VisualTokens, int | None]]) -> list[Kept]:
        """What stays of every grid, given how many of its tokens."""
        found: dict[int, Kept] = {}
        alike: dict[tuple[int, int | None], list[int]] = {}
        for i, (frame, count) in enumerate(grids):
            n = len(frame.embeddings)
            if count is None or 0 < count < n:
                alike.setdefault((n, count), []).append(i)
            else:
                found[i] = Kept(torch.full((n,), count > 0, device=frame.embeddings.device))
        for (_, count), members in alike.items():
            given = [grids[i][0] for i in members]
            masks = self.select(given, count)
            merged = self.merge(given, masks)
            for place, i in enumerate(members):
                found[i] = Kept(masks[place], None if merged is None else merged[place])
        return [found[i] for i in range(len(grids))]

    def __call__(self, model: Any, *, full_length: bool = False) -> AbstractContextManager[PruneStats]:
        """A block in which `model` (a supported transformers VLM) is pruned; it yields `stats`, reset on entry.

        `full_length`: logits get the unpruned length back, zeros where tokens were dropped, and `labels` may be given: those
        that only a dropped token predicts are ignored.

        Raises:
            UserError: unsupported model, or one that is already inside such a block (when entered).
        """
        from codebook_prune.block import pruned

        return pruned(model, (self,), self.stats, full_length)

    def __or__(self, other: Pruner | LayerPruner | PrunerChain) -> PrunerChain:
        """This pruner, then `other` on what it kept."""
        return PrunerChain((self,)) | other


@dataclass(frozen=True, kw_only=True)
class LayerPruner(ABC):
    """A pruning method that drops tokens in front of decoder layers, ranked by attention. A new one is one file.

    `with pruner(model): ...` prunes the prompt of every call inside the block: a call on an empty cache, or one that brings
    images. What it generates is never dropped, and what was kept is kept for good. (Without a cache there is nothing to keep it
    in: every step is a prompt of its own.) The last token of a prompt always stays. `positions`: "compact" closes the gaps that
    this pruner's drops leave, in the layers behind them; "original" leaves every token its own number.

    Raises:
        UserError: an unknown position policy, or fields out of range.
    """

    positions: Positions = "original"
    stats: PruneStats = field(default_factory=PruneStats, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_positions(self.positions)

    @abstractmethod
    def plan(self, layers: int) -> Mapping[int, Attention]:
        """Where it acts in a decoder of `layers` layers, and on which attention.

        Returns:
            In front of which layers (1 to layers - 1) it drops tokens, and whether it ranks them by what the previous layer
            attended to or by what the next one would attend to if nothing were dropped (which takes a dry run).

        Raises:
            UserError: the decoder has too few layers.
        """

    @abstractmethod
    def keep(self, view: LayerView) -> Tensor:
        """Keep mask [batch, length] bool over the columns of `view`; all that is neither visual nor text must stay."""

    def __call__(self, model: Any, *, full_length: bool = False) -> AbstractContextManager[PruneStats]:
        """See `Pruner.__call__`."""
        from codebook_prune.block import pruned

        return pruned(model, (self,), self.stats, full_length)

    def __or__(self, other: Pruner | LayerPruner | PrunerChain) -> PrunerChain:
        """This pruner, then `other` on what it kept."""
        return PrunerChain((self,)) | other


@dataclass(frozen=True)
class PrunerChain:
    """Pruners applied one after the other, in one block. The chain's `stats` count; its members' stay untouched.

    Budgets apply to what the member is given: keep_ratio=0.5 after keep_ratio=0.5 keeps a quarter. Members that drop before
    layer 0 come first; those inside the decoder act layer by layer, at the same layer in the chain's order. Members inside the
    decoder may number positions each in their own way.

    Raises:
        UserError: members before layer 0 disagree about `positions` or stand behind one inside the decoder.
    """

    pruners: tuple[Pruner | LayerPruner, ...]
    stats: PruneStats = field(default_factory=PruneStats, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        inside = [isinstance(pruner, LayerPruner) for pruner in self.pruners]
        if inside != sorted(inside):
            raise UserError(
                "a pruner that acts before layer 0 must stand in front of those inside the decoder: reorder the chain"
            )
        if len({pruner.positions for pruner in self.pruners if isinstance(pruner, Pruner)}) > 1:
            raise UserError("the pruners of a chain must agree on positions: give all of them the same")

    def __or__(self, other: Pruner | LayerPruner | PrunerChain) -> PrunerChain:
        """This chain, then `other`."""
        return PrunerChain(self.pruners + (other.pruners if isinstance(other, PrunerChain) else (other,)))

    def __call__(self, model: Any, *, full_length: bool = False) -> AbstractContextManager[PruneStats]:
        """See `Pruner.__call__`."""
        from codebook_prune.block import pruned

        return pruned(model, self.pruners, self.stats, full_length)


def _check_positions(positions: object) -> None:
    if positions not in get_args(Positions):
        raise UserError(f"positions must be 'compact' or 'original', not {positions!r}")
