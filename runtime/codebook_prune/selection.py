"""Which visual tokens of a call stay: from the embeddings that enter the decoder to one keep mask an image or video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from codebook_prune.adapters.base import VLMAdapter, entering_tokens
from codebook_prune.encoder import EncoderTap
from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import Item, Kept, Layout, VisualTokens, layout_on


@dataclass(frozen=True)
class EnteringImages:
    """The images and videos of one call, in the order they enter.

    items: where they belong. tokens: every item's visual tokens. column: [n] place of all of these in the flattened
    [batch * length] sequence. ids: [batch, length] long, the token ids.
    """

    items: list[Item]
    tokens: list[VisualTokens]
    column: Tensor
    ids: Tensor

    @property
    def prompts(self) -> Tensor:
        """[batch, columns] long, the token ids up to the last visual token."""
        return self.ids[:, : 1 + int((self.column % self.ids.shape[1]).max())]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every item."""
        return [len(item.layout) for item in self.items]

    @property
    def layouts(self) -> list[Layout]:
        """Where the tokens of every item belong."""
        return [item.layout for item in self.items]


def entering_images(
    adapter: VLMAdapter,
    call: Mapping[str, Any],
    embeds: Tensor,
    position_ids: Tensor | None,
    drafted: int | None = None,
    encoder: EncoderTap | None = None,
) -> EnteringImages | None:
    """Cut the visual tokens out of a call's input embeddings [batch, length, d]; None when there are none.

    `drafted` fills in `VisualTokens.text`: what else is in the row, padding and so many of the last tokens left out; `encoder`
    fills in `VisualTokens.encoder`.

    Raises:
        UserError: an image or video does not enter whole, or its grid cannot be told.
    """
    entering = entering_tokens(adapter, call, embeds.detach(), position_ids)
    if not len(entering):
        return None
    items = adapter.layout(entering)
    tokens, lengths = [], [len(item.layout) for item in items]
    for item, vectors in zip(items, entering.embeddings.split_with_sizes(lengths), strict=True):
        place = layout_on(item.layout, embeds.device)
        frame = place.frame if item.layout.frames else None
        tokens.append(VisualTokens(vectors, None, place.position, frame=frame, is_video=item.is_video))
    rows = [item.row for item in items]
    if drafted is not None:
        texts = {row: _text(adapter, call, embeds, row, drafted) for row in set(rows)}
        tokens = [replace(own, text=texts[row]) for own, row in zip(tokens, rows, strict=True)]
    if encoder is not None:
        views = encoder.views(call, lengths, rows, len(embeds))
        tokens = [replace(own, encoder=view) for own, view in zip(tokens, views, strict=True)]
    return EnteringImages(items, tokens, entering.place, call["input_ids"])


def _text(adapter: VLMAdapter, call: Mapping[str, Any], embeds: Tensor, row: int, drafted: int) -> Tensor:
    """Input embeddings [t, d] of the text of a row's prompt."""
    text, mask = ~adapter.visual_mask(call["input_ids"][row]), call.get("attention_mask")
    text[len(text) - drafted :] = False
    if mask is not None:
        text = text & mask[row, -len(text) :].to(text.device, torch.bool)
    return embeds[row, text.to(embeds.device)].detach()


@dataclass(frozen=True)
class Chosen:
    """What stays of a call's visual tokens: a keep mask [n] bool an item, and the embeddings of all tokens [n, d] where some
    were merged into others (None: as they entered; those of dropped tokens mean nothing)."""

    masks: list[Tensor]
    embeddings: Tensor | None


def _keep(pruner: Pruner, items: Sequence[VisualTokens], images: EnteringImages) -> list[Kept | None]:
    """What one pruner keeps of every item of `images`, given what is left of it."""
    rows, limits = [item.row for item in images.items], list[int | None]([None] * len(items))
    if isinstance(pruner.keep_tokens, tuple):
        limits = pruner.budget.per_image(rows, images.prompts)
    if not pruner.by_prompt:
        return pruner.keep_each(items, limits)
    kept: list[Kept | None] = []
    for row in sorted(set(rows)):
        here = slice(rows.index(row), rows.index(row) + rows.count(row))
        kept += pruner.keep_each(items[here], limits[here])
    return kept


def choose(pruners: Sequence[Pruner], images: EnteringImages) -> Chosen | None:
    """What stays after all pruners, or None when no budget asks for less than everything.

    Newlines stay. Each pruner is given what the one before kept, as it left it.
    """
    scored = [layout_on(one, images.column.device).in_grid for one in images.layouts]
    left = list(scored)
    tokens, dropped, merged = list(images.tokens), False, False
    for pruner in pruners:
        given = [own if mask is None else own.only(mask) for own, mask in zip(tokens, left, strict=True)]
        for number, kept in enumerate(_keep(pruner, given, images)):
            if kept is None:
                continue
            mask, dropped = left[number], True
            left[number] = mask = kept.mask if mask is None else mask.masked_scatter(mask, kept.mask)
            if kept.embeddings is not None:
                tokens[number], merged = tokens[number].with_embeddings(mask, kept.embeddings), True
    if not dropped:
        return None
    masks = []
    for mask, grid, own in zip(left, scored, images.tokens, strict=True):
        every = torch.ones(len(own.embeddings), dtype=torch.bool, device=images.column.device) if mask is None else mask
        masks.append(every if grid is None else every | ~grid)
    return Chosen(masks, torch.cat([own.embeddings for own in tokens]) if merged else None)
