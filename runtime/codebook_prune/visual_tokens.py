"""Visual tokens: what an image or video is once vision encoder and connector are done with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncoderView:
    """What the vision encoder computed for the tokens of one image, at the layer whose output enters the connector.

    hidden: [n, d_v], that output. attention: [n] float32, what each token gets from [CLS], mean over heads; without a [CLS],
    from all tokens of the image, mean over these and heads. keys: [n, d_k] float32, mean over heads. cls: [d_v], the output of
    the [CLS], or None. project: the connector, [m, d_v] -> [m, d].
    """

    hidden: Tensor
    attention: Tensor
    keys: Tensor
    cls: Tensor | None
    project: Callable[[Tensor], Tensor]

    def only(self, chosen: Tensor) -> EncoderView:
        """The tokens where `chosen` [n] bool is True."""
        return replace(self, hidden=self.hidden[chosen], attention=self.attention[chosen], keys=self.keys[chosen])


@dataclass(frozen=True)
class VisualTokens:
    """Connector outputs of one or more images or videos, in the order they enter the LLM.

    embeddings: [n, d]. image: [n] long, which item (image or video) each token belongs to. position: [n, 2] long, (row, column)
    in its grid, (-1, -1) for newline and separator embeddings, which are never probed and never pruned. cls_similarity: [n]
    cosine to the vision encoder's [CLS] at the feature layer, or None for encoders without one. frame: [n] long, which of its
    item's grids each token lies in: the frame of a video, the crop or tile of an image, of which the last covers all of it
    (separators count with the grid they stand behind); None where every item has one grid. text: [t, d] input embeddings of the
    text tokens in ONE item's prompt, for pruners that ask for them (`Pruner.sees_text`), else None. encoder: of ONE item,
    likewise (`Pruner.sees_encoder`). is_video: of ONE item, whether its frames follow each other in time. layer_features:
    [n, k, d], what is added to each token behind the first k decoder layers (DeepStack), of `encode` only; None without such.
    """

    embeddings: Tensor
    image: Tensor
    position: Tensor
    cls_similarity: Tensor | None = None
    frame: Tensor | None = None
    text: Tensor | None = None
    encoder: EncoderView | None = None
    is_video: bool = False
    layer_features: Tensor | None = None

    def only(self, chosen: Tensor) -> VisualTokens:
        """The tokens where `chosen` [n] bool is True."""
        some = (self.cls_similarity, self.frame, self.layer_features)
        cls, frame, features = (None if x is None else x[chosen] for x in some)
        seen = None if self.encoder is None else self.encoder.only(chosen)
        part = replace(self, embeddings=self.embeddings[chosen], image=self.image[chosen], position=self.position[chosen])
        return replace(part, cls_similarity=cls, frame=frame, encoder=seen, layer_features=features)

    def with_embeddings(self, chosen: Tensor, embeddings: Tensor) -> VisualTokens:
        """These tokens, where `chosen` [n] bool is True with other `embeddings` [chosen, d]."""
        vectors = self.embeddings.clone()
        vectors[chosen] = embeddings.to(vectors.dtype)
        return replace(self, embeddings=vectors)

    def frames(self) -> list[VisualTokens]:
        """One item's tokens grid by grid, in order, not copied."""
        if self.frame is None:
            return [self]
        lengths = torch.unique_consecutive(self.frame, return_counts=True)[1].tolist()
        parts = zip(*(torch.split(x, lengths) for x in (self.embeddings, self.image, self.position)), strict=True)
        return [VisualTokens(vectors, item, place, text=self.text) for vectors, item, place in parts]


@dataclass(frozen=True)
class Kept:
    """What stays of an image or video: mask [n] bool, and the new embeddings [kept, d] of these tokens (None: as they were)."""

    mask: Tensor
    embeddings: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Kept], tokens: VisualTokens) -> Kept:
        """Of the grids of one item, `tokens`, in order."""
        mask = torch.cat([part.mask for part in parts])
        if all(part.embeddings is None for part in parts):
            return cls(mask)
        vectors = torch.split(tokens.embeddings, [len(part.mask) for part in parts])
        both = zip(parts, vectors, strict=True)
        return cls(mask, torch.cat([own[p.mask] if p.embeddings is None else p.embeddings for p, own in both]))


@dataclass(frozen=True)
class EnteringTokens:
    """The visual tokens of one call as they are about to enter the decoder, in order, row by row: what a layout is read off.

    ids: [n] long, the placeholder of each. row, column: [n] long, batch row and place in it. These on the CPU. embeddings:
    [n, d]. input_ids: [batch, length], with the text around them. call: the keyword arguments of the base model's forward;
    inside `generate` the encoder has already run, and its outputs (`mm_encoder_outputs`) stand for pixels, image sizes and
    grids. position_ids: what the decoder is given as such, None where it is left to count.
    """

    ids: Tensor
    row: Tensor
    column: Tensor
    embeddings: Tensor
    input_ids: Tensor
    call: Mapping[str, Any]
    position_ids: Tensor | None = None

    def only(self, chosen: Tensor) -> EnteringTokens:
        """The tokens where `chosen` [n] bool is True."""
        part = replace(self, ids=self.ids[chosen], row=self.row[chosen], column=self.column[chosen])
        return replace(part, embeddings=self.embeddings[chosen.to(self.embeddings.device)])

    def runs(self) -> list[int]:
        """Lengths of the stretches of tokens that follow each other with no text between."""
        if not len(self.ids):
            return []
        place = self.row * self.input_ids.shape[1] + self.column
        cut = ((place.diff() != 1) | (self.row.diff() != 0)).nonzero().flatten() + 1
        return torch.tensor([0, *cut.tolist(), len(place)]).diff().tolist()

    def video_lengths(self) -> list[int]:
        """How many of these tokens, all of videos, belong to each one: equally many, as the videos of a call are one tensor."""
        encoded = (self.call.get("mm_encoder_outputs") or {}).get("video")
        videos = len(self.call["pixel_values_videos"] if encoded is None else encoded.pooler_output)
        return [len(self.ids) // videos] * videos
