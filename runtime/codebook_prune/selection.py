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
    """Keep mask [n] bool of every image after all pruners, or None when no budget asks for less than everything.

    Newlines stay. Each pruner is given what the one before kept; images of equal sizes and budgets go through it together.
    """
    device = images.column.device
    scored = [position[:, 0] >= 0 for position in images.positions]  # on the CPU
    left = [None if bool(mask.all()) else mask.to(device) for mask in scored]
    dropped = False
    for pruner in pruners:
        alike: dict[tuple[int, int | None], list[tuple[int, VisualTokens]]] = {}
        for number, limit in enumerate(pruner.budget.per_image(images.rows, batch)):
            mask, given = left[number], images.tokens[number]
            given = given if mask is None else given.only(mask)
            n = len(given.embeddings)
            if (count := pruner.budget.count(n, limit)) != n:
                alike.setdefault((n, count), []).append((number, given))
        for (_, count), members in alike.items():
            for (number, _), kept in zip(members, pruner.select([given for _, given in members], count), strict=True):
                mask, dropped = left[number], True
                left[number] = kept if mask is None else mask.masked_scatter(mask, kept)
    if not dropped:
        return None
    masks = []
    for mask, own, n in zip(left, scored, images.lengths, strict=True):
        every = torch.ones(n, dtype=torch.bool, device=device) if mask is None else mask
        masks.append(every if bool(own.all()) else every | ~own.to(device))
    return masks
