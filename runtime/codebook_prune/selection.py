"""Which visual tokens of a call stay: from the embeddings that enter the decoder to one keep mask an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codebook_prune.adapters.base import VisualTokens, VLMAdapter
from codebook_prune.pruners.base import Pruner


@dataclass(frozen=True)
class EnteringImages:
    """The images of one call, in the order they enter.

    tokens: every image's visual tokens. column: [n] place of all of them in the flattened [batch * length] sequence. lengths,
    rows: tokens and batch row of every image. positions: `VisualTokens.position` of every image, on the CPU.
    """

    tokens: list[VisualTokens]
    column: Tensor
    lengths: list[int]
    rows: list[int]
    positions: list[Tensor]


def entering_images(adapter: VLMAdapter, call: Mapping[str, Any], embeds: Tensor) -> EnteringImages | None:
    """Cut the visual tokens out of a call's input embeddings [batch, length, d]; None when there are none.

    Raises:
        UserError: an image does not enter whole.
    """
    image = adapter.image_index(call["input_ids"], call).to(embeds.device).flatten()
    column = (image >= 0).nonzero().squeeze(1)
    image = image[column]
    lengths: list[int] = torch.unique_consecutive(image, return_counts=True)[1].tolist()
    if not lengths:
        return None
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows: list[int] = (column[starts] // embeds.shape[1]).tolist()
    position = adapter.token_positions(lengths)
    vectors = embeds.detach().flatten(0, 1)[column]
    parts = [torch.split(x, lengths) for x in (vectors, image, position.to(embeds.device))]
    tokens = [VisualTokens(*part) for part in zip(*parts, strict=True)]
    return EnteringImages(tokens, column, lengths, rows, list(torch.split(position, lengths)))


def keep_masks(pruners: Sequence[Pruner], images: EnteringImages, batch: int) -> list[Tensor] | None:
    """Keep mask [n] bool of every image after all pruners, or None when no budget asks for less than everything."""
    limits = zip(*(pruner.budget.per_image(images.rows, batch) for pruner in pruners), strict=True)
    masks = [
        _keep_image(pruners, tokens, position[:, 0] >= 0, own)
        for tokens, position, own in zip(images.tokens, images.positions, limits, strict=True)
    ]
    if all(mask is None for mask in masks):
        return None
    device = images.column.device
    return [
        torch.ones(n, dtype=torch.bool, device=device) if mask is None else mask
        for mask, n in zip(masks, images.lengths, strict=True)
    ]


def _keep_image(pruners: Sequence[Pruner], tokens: VisualTokens, scored: Tensor, limits: Sequence[int | None]) -> Tensor | None:
    """One image's keep mask, None when nothing was dropped; `scored` [n], on the CPU, is False for newlines, which stay."""
    newline = None if bool(scored.all()) else ~scored.to(tokens.embeddings.device)
    left = newline if newline is None else ~newline
    dropped = False
    for pruner, limit in zip(pruners, limits, strict=True):
        given = tokens
        if left is not None:
            given = VisualTokens(tokens.embeddings[left], tokens.image[left], tokens.position[left])
        kept = pruner.keep(given, limit)
        if kept is not None:
            left = kept if left is None else left.masked_scatter(left, kept)
            dropped = True
    if not dropped or left is None:
        return None
    return left if newline is None else left | newline
