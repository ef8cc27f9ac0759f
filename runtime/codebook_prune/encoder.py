"""What the vision encoder computed on the way to the visual tokens: hidden states, attention and keys of one of its layers.

Read with the same tap as decoder layers, so the encoder keeps the attention it was loaded with. What was read travels on the
encoder's output, which transformers hands from `generate` to the model, and may be reused with it in another block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.attention import Tap, probabilities
from codebook_prune.budget import sources
from codebook_prune.visual_tokens import EncoderView
from codebook_schemas import UserError

ATTRIBUTE = "_codebook_prune_encoder"


@dataclass(frozen=True)
class EncoderRead:
    """Of all images of one encoder call: hidden [images, length, d]; attention [images, length] that each token gets, see
    `EncoderView`; keys [images, length, key d]. length counts a [CLS] in front."""

    hidden: Tensor
    attention: Tensor
    keys: Tensor


class EncoderTap:
    """Reads the encoder of a model while a block lasts; `handles` are what removes the hooks."""

    def __init__(self, adapter: VLMAdapter) -> None:
        encoder = adapter.encoder
        if encoder is None:
            raise UserError(
                f"the vision encoder of {adapter.family} cannot be read: choose a pruner that does not look into it"
            )
        self.encoder, self.project = encoder, adapter.connector
        self.tap = Tap(encoder.layer, 0)
        self._hidden: Tensor | None = None
        self._latest: EncoderRead | None = None

    def install(self, handles: list[Any]) -> None:
        """Put tap and hooks in place."""
        self.tap.install()
        self.tap.on = True
        handles.append(self.tap)
        handles.append(self.encoder.layer.register_forward_hook(self._after_layer))
        handles.append(self.encoder.tower.register_forward_hook(self._after_tower))

    def _after_layer(self, module: Any, args: Any, output: Any) -> None:
        self._hidden = (output[0] if isinstance(output, tuple) else output).detach()

    @torch.no_grad()
    def _after_tower(self, module: Any, args: Any, output: Any) -> None:
        query, key, hidden = self.tap.query, self.tap.key, self._hidden
        if query is None or key is None or hidden is None:
            raise UserError("the vision encoder ran without the layer that was to be read")
        rows = query[:, :, :1] if self.encoder.has_cls else query
        everything = torch.ones(1, rows.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
        heads = [
            probabilities(rows[:, h : h + 1], key[:, h : h + 1], self.tap.scaling, everything) for h in range(key.shape[1])
        ]
        attention = torch.stack([head[:, 0].mean(1) for head in heads]).mean(0)
        self._latest = EncoderRead(hidden, attention, key.float().mean(1))
        setattr(output, ATTRIBUTE, self._latest)
        self.tap.query = self.tap.key = self._hidden = None

    def views(self, call: Mapping[str, Any], lengths: Sequence[int], rows: Sequence[int], batch: int) -> list[EncoderView]:
        """What the encoder computed for each image that enters.

        Args:
            call: keyword arguments of the base model's forward.
            lengths: tokens of every image. rows: its batch row. batch: rows of the call.

        Raises:
            UserError: the images were encoded elsewhere, or are not the encoder's whole grid.
        """
        encoded = (call.get("mm_encoder_outputs") or {}).get("image")
        read = self._latest if encoded is None else getattr(encoded, ATTRIBUTE, None)
        if read is None:
            raise UserError("these images were not encoded inside a block of this pruner: pass pixel_values instead")
        images = len(read.hidden)
        origin = sources(rows, batch, images)
        tokens = read.hidden.shape[1] - self.encoder.has_cls
        if origin is None or any(length not in (tokens, read.hidden.shape[1]) for length in lengths):
            raise UserError(
                f"{sum(lengths)} visual tokens enter, the vision encoder made {images} x {tokens}: they do not match"
            )
        found = []
        for image, length in zip(origin, lengths, strict=True):
            hidden, attention, keys = (x[image, -length:] for x in (read.hidden, read.attention, read.keys))
            cls = read.hidden[image, 0] if self.encoder.has_cls else None
            found.append(EncoderView(hidden, attention, keys, cls, self.project))
        return found
