"""Visual tokens: what an image or video is once vision encoder and connector are done with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
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

    embeddings: [n, d]. image: [n] long, which item (image or video) each token belongs to; None: all to one. position: [n, 2]
    long, (row, column) in its grid, (-1, -1) for newline and separator embeddings, which are never probed and never pruned.
    cls_similarity: [n] cosine to the vision encoder's [CLS] at the feature layer, or None for encoders without one. frame: [n]
    long, which of its item's grids each token lies in: the frame of a video, the crop or tile of an image, of which the last
    covers all of it (separators count with the grid they stand behind); None where every item has one grid. text: [t, d] input
    embeddings of the text tokens in ONE item's prompt, for pruners that ask for them (`Pruner.sees_text`), else None. encoder:
    of ONE item, likewise (`Pruner.sees_encoder`). is_video: of ONE item, whether its frames follow each other in time.
    layer_features: [n, k, d], what is added to each token behind the first k decoder layers (DeepStack), of `encode` only; None
    without such.
    """

    embeddings: Tensor
    image: Tensor | None
    position: Tensor
    cls_similarity: Tensor | None = None
    frame: Tensor | None = None
    text: Tensor | None = None
    encoder: EncoderView | None = None
    is_video: bool = False
    layer_features: Tensor | None = None

    def only(self, chosen: Tensor) -> VisualTokens:
        """The tokens where `chosen` [n] bool is True."""
        some = (self.image, self.cls_similarity, self.frame, self.layer_features)
        image, cls, frame, features = (None if x is None else x[chosen] for x in some)
        seen = None if self.encoder is None else self.encoder.only(chosen)
        part = replace(self, embeddings=self.embeddings[chosen], image=image, position=self.position[chosen])
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
        parts = zip(torch.split(self.embeddings, lengths), torch.split(self.position, lengths), strict=True)
        return [VisualTokens(vectors, None, place, text=self.text) for vectors, place in parts]


@dataclass(frozen=True)
class Kept:
    """What stays of an image or video: mask [n] bool, and the new embeddings [kept, d] of these tokens (None: as they were)."""

    mask: Tensor
    embeddings: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Kept], tokens: VisualTokens) -> Kept:
        """Of the grids of one item, `tokens`, in order."""
        if len(parts) == 1:
            return parts[0]
        mask = torch.cat([part.mask for part in parts])
        if all(part.embeddings is None for part in parts):
            return cls(mask)
        vectors = torch.split(tokens.embeddings, [len(part.mask) for part in parts])
        both = zip(parts, vectors, strict=True)
        return cls(mask, torch.cat([own[p.mask] if p.embeddings is None else p.embeddings for p, own in both]))


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of one image or video belong: its `frame` [n] and `position` [n, 2] as in `VisualTokens`, on the CPU.

    Layouts are shared between calls and must not be written to.
    """

    frame: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.frame)

    @cached_property
    def frames(self) -> bool:
        """Whether there are several grids."""
        return bool(self.frame.any())

    @cached_property
    @torch.inference_mode(False)
    def in_grid(self) -> Tensor | None:
        """[n] bool, False for newlines and separators; None: there are none."""
        inside = self.position[:, 0] >= 0
        return None if bool(inside.all()) else inside


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def layout_on(layout: Layout, device: torch.device) -> Layout:
    """A layout with its tensors on another device, moved there once."""
    return layout if device.type == "cpu" else Layout(layout.frame.to(device), layout.position.to(device))


@dataclass(frozen=True)
class Item:
    """One image or video of a call: where its tokens belong, and the batch row it enters in."""

    layout: Layout
    row: int
    is_video: bool


@dataclass(frozen=True)
class EnteringTokens:
    """The visual tokens of one call as they are about to enter the decoder, in order, row by row: what a layout is read off.

    place: [n] long, where in the flattened [batch * length] sequence. embeddings: [n, d]. input_ids: [batch, length], with the
    text around them. call: the keyword arguments of the base model's forward; inside `generate` the encoder has already run,
    and its outputs (`mm_encoder_outputs`) stand for pixels, image sizes and grids. position_ids: what the decoder is given as
    such, None where it is left to count.
    """

    place: Tensor
    embeddings: Tensor
    input_ids: Tensor
    call: Mapping[str, Any]
    position_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.place)

    @cached_property
    def ids(self) -> Tensor:
        """[n] long on the CPU, the placeholder of each."""
        return self.input_ids.flatten()[self.place.to(self.input_ids.device)].cpu()

    @cached_property
    def places(self) -> list[int]:
        """`place` as numbers."""
        found: list[int] = self.place.tolist()
        return found

    @property
    def row(self) -> Tensor:
        """[n] long on the CPU, the batch row of each."""
        return self.place.cpu() // self.input_ids.shape[1]

    @property
    def column(self) -> Tensor:
        """[n] long on the CPU, the place of each in its row."""
        return self.place.cpu() % self.input_ids.shape[1]

    def only(self, chosen: Tensor) -> EnteringTokens:
        """The tokens where `chosen` [n] bool is True."""
        chosen = chosen.to(self.place.device)
        return replace(self, place=self.place[chosen], embeddings=self.embeddings[chosen.to(self.embeddings.device)])

    def runs(self) -> list[int]:
        """Lengths of the stretches of tokens that follow each other with no text between."""
        width = self.input_ids.shape[1]
        cuts = [i for i, (a, b) in enumerate(pairwise(self.places), 1) if b != a + 1 or b % width == 0]
        return [b - a for a, b in pairwise([0, *cuts, len(self)])] if len(self) else []

    def video_lengths(self) -> list[int]:
        """How many of these tokens, all of videos, belong to each one: equally many, as the videos of a call are one tensor."""
        encoded = (self.call.get("mm_encoder_outputs") or {}).get("video")
        videos = len(self.call["pixel_values_videos"] if encoded is None else encoded.pooler_output)
        return [len(self) // videos] * videos
