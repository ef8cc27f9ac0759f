"""What the library needs to know of a model family, and nothing else knows it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VisualTokens:
    """Connector outputs of one or more images, in the order they enter the LLM.

    embeddings: [n, d]. image: [n] long, which image each token belongs to. position: [n, 2] long, (row, column) in its image's
    grid, (-1, -1) for newline and separator embeddings, which are never probed and never pruned. cls_similarity: [n] cosine to
    the vision encoder's [CLS] at the feature layer, or None for encoders without one.
    """

    embeddings: Tensor
    image: Tensor
    position: Tensor
    cls_similarity: Tensor | None = None

    def of_image(self, index: int) -> VisualTokens:
        """The tokens of one image."""
        return self.only(self.image == index)

    def only(self, chosen: Tensor) -> VisualTokens:
        """The tokens where `chosen` [n] bool is True."""
        cls = None if self.cls_similarity is None else self.cls_similarity[chosen]
        return VisualTokens(self.embeddings[chosen], self.image[chosen], self.position[chosen], cls)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the first image's grid."""
        rows, columns = (self.position[self.image == self.image[0]].max(0).values + 1).tolist()
        return rows, columns


class VLMAdapter(ABC):
    """One model family. A new family is one file beside this one with one subclass; it is found by itself."""

    model_types: ClassVar[tuple[str, ...]] = ()
    """The `config.model_type` values this adapter serves."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config

    @property
    def family(self) -> str:
        """The model type, as transformers names it."""
        return str(self.config.model_type)

    @property
    def decoder(self) -> nn.Module:
        """The text model; called with `inputs_embeds`, `attention_mask`, `position_ids`, `past_key_values` as keywords."""
        decoder: nn.Module = self.model.get_decoder()
        return decoder

    @property
    def hidden_size(self) -> int:
        """Dimension d of the visual tokens that enter the decoder."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """Ids of the placeholders that are replaced by visual embeddings."""
        names = ("image_token_id", "video_token_id")
        return tuple(i for name in names if isinstance(i := getattr(self.config, name, None), int))

    def visual_mask(self, input_ids: Tensor) -> Tensor:
        """[batch, length] bool: where visual embeddings enter."""
        return torch.isin(input_ids, torch.tensor(self.visual_token_ids, device=input_ids.device))

    def image_index(self, input_ids: Tensor, call: Mapping[str, Any]) -> Tensor:
        """[batch, length] long: index of the image (over the whole batch) of each visual token, -1 for text.

        `call` are the keyword arguments of the base model's forward, which tell how many tokens each image has.
        """
        mask = self.visual_mask(input_ids)
        index = torch.full_like(input_ids, -1)
        total = int(mask.sum())
        if total:
            lengths = torch.tensor(self.image_lengths(total, call), device=input_ids.device)
            index[mask] = torch.arange(len(lengths), device=input_ids.device).repeat_interleave(lengths)
        return index

    @abstractmethod
    def image_lengths(self, total: int, call: Mapping[str, Any]) -> list[int]:
        """Tokens of every image in a call whose prompts hold `total` placeholders."""

    @abstractmethod
    def token_positions(self, lengths: Sequence[int]) -> Tensor:
        """`VisualTokens.position` of images of these `lengths`, without running anything: [sum(lengths), 2] long on the CPU.

        Raises:
            UserError: no image of this family has such a length.
        """

    @abstractmethod
    def encode(self, inputs: Mapping[str, Any]) -> VisualTokens:
        """Vision tower and connector on a processor's output, no LLM: the visual tokens of all images in it."""

    @property
    @abstractmethod
    def connector(self) -> nn.Module:
        """The module between vision encoder and LLM."""

    def fingerprint(self) -> str:
        """Hash of the connector: two models with the same fingerprint share their visual tokens' meaning.

        Weights are compared as bfloat16, so the same checkpoint loaded in another precision has the same fingerprint.
        """
        digest = hashlib.sha256(f"{self.family}:{self.hidden_size}".encode())
        for name, weight in sorted(self.connector.state_dict().items()):
            sample = weight.detach().flatten()[:4096].to("cpu", torch.bfloat16)
            digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]
