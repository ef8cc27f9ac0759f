"""What the library needs to know of a model family, and nothing else knows it."""

from __future__ import annotations

import functools
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from codebook_prune.visual_tokens import EnteringTokens, Item, Layout, VisualTokens, layout_on
from codebook_schemas import UserError


@dataclass(frozen=True)
class Encoder:
    """Where a family's vision encoder can be read: the module whose output `get_image_features` returns, the layer of it whose
    output enters the connector (with a `self_attn` that knows its `config`), and whether a [CLS] stands in front."""

    tower: nn.Module
    layer: nn.Module
    has_cls: bool


CUT = (
    "these encoder outputs have no last_hidden_state, so nothing tells whether they are whole: pass all that the model's "
    "get_image_features returns; a prefill in chunks (prefill_chunk_size), which cuts them, cannot be pruned"
)
NOT_WHOLE = "an image or video does not enter whole: a prefill in chunks (prefill_chunk_size) cannot be pruned"


class VLMAdapter(ABC):
    """One model family. A new family is one file beside this one with one subclass; it is found by itself."""

    model_types: ClassVar[tuple[str, ...]] = ()
    """The `config.model_type` values this adapter serves."""

    numbers_in_line: ClassVar[bool] = True
    """Whether position ids count tokens, so that dropping leaves gaps to close. False with M-RoPE, where a visual token's
    position is its place in time, height and width: kept tokens keep it whatever a pruner's `positions` say."""

    own_masks: ClassVar[bool] = False
    """Whether the base model makes the decoder's masks, of which some are windows or not causal (Gemma 3): then tokens are
    dropped in front of layer 0 only, with compact positions, and `masks` says what the decoder is given instead."""

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

    @cached_property
    def visual_token_ids(self) -> tuple[int, ...]:
        """Ids of the placeholders that are replaced by visual embeddings: of images, then of videos."""
        names = ("image_token_id", "video_token_id")
        return tuple(i for name in names if isinstance(i := getattr(self.config, name, None), int))

    def visual_mask(self, input_ids: Tensor) -> Tensor:
        """[batch, length] bool: where visual embeddings enter."""
        return _among(input_ids, self.visual_token_ids)

    def layout(self, entering: EnteringTokens) -> list[Item]:
        """The images and videos of a call in the order they enter, over the whole batch.

        Raises:
            UserError: one does not enter whole, or its grid cannot be told from the call.
        """
        encoded = (entering.call.get("mm_encoder_outputs") or {}).values()
        if any(out is not None and out.last_hidden_state is None for out in encoded):
            raise UserError(CUT)
        if len(self.visual_token_ids) == 1 or not bool((video := entering.ids == self.visual_token_ids[1]).any()):
            return [item for _, item in _items(entering, self.image_layout(entering))]
        found: list[tuple[int, Item]] = []
        for mine, of_kind, is_video in ((~video, self.image_layout, False), (video, self.video_layout, True)):
            if bool(mine.any()):
                found += _items(entering, of_kind(entering.only(mine)), mine, is_video)
        return [item for _, item in sorted(found, key=itemgetter(0))]

    @abstractmethod
    def image_layout(self, entering: EnteringTokens) -> list[Layout]:
        """The layouts of the images, of which these are all tokens, in order."""

    def video_layout(self, entering: EnteringTokens) -> list[Layout]:
        """The layouts of the videos, of which these are all tokens; families with a placeholder for videos have them.

        Raises:
            UserError: the family has none.
        """
        raise UserError(f"videos are not supported for {self.family}")

    def masks(self, arguments: Mapping[str, Any], types: Tensor | None) -> Any:
        """The decoder's masks after a drop, in families with `own_masks`.

        Args:
            arguments: what the decoder is about to be given, `attention_mask` [batch, length] among it.
            types: [batch, new length], the call's `token_type_ids` of the columns that enter; None: it has none.
        """
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Any]) -> VisualTokens:
        """Vision tower and connector on a processor's output for images (`input_ids` among it), no LLM: their visual tokens."""
        features = self.model.base_model.get_image_features
        known = inspect.signature(features).parameters
        given = {name: value for name, value in inputs.items() if name in known}
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        given = {name: value.to(self.model.device) if isinstance(value, Tensor) else value for name, value in given.items()}
        out = features(**given, return_dict=True)
        vectors = out.pooler_output
        embeddings = vectors.flatten(0, -2) if isinstance(vectors, Tensor) else torch.cat(list(vectors)).flatten(0, -2)
        entering = entering_tokens(self, {**inputs, "mm_encoder_outputs": {"image": out}}, embeddings)
        layouts = [layout_on(item.layout, embeddings.device) for item in self.layout(entering)]
        image = torch.repeat_interleave(torch.tensor([len(one) for one in layouts])).to(embeddings.device)
        frame = torch.cat([one.frame for one in layouts]) if any(one.frames for one in layouts) else None
        cls, features = self.cls_similarity(out, inputs), self.layer_features(out)
        position = torch.cat([one.position for one in layouts])
        return VisualTokens(embeddings, image, position, cls, frame, layer_features=features)

    def cls_similarity(self, out: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """`VisualTokens.cls_similarity` of `encode`, from what `get_image_features` returned; None: there is no [CLS]."""
        del out, inputs
        return None

    def layer_features(self, out: Any) -> Tensor | None:
        """`VisualTokens.layer_features` of `encode`, from what `get_image_features` returned; None: there are none."""
        del out
        return None

    def placed(self, place: Tensor, features: Tensor | None) -> dict[str, Any]:
        """Decoder arguments that put tokens where the family would put them; default: none, positions are counted.

        Args:
            place: [batch, length, 3] long, time, height and width of every token.
            features: [batch, length, k, d], `VisualTokens.layer_features`, zeros for text; None where the family has none.
        """
        del place, features
        return {}

    @property
    def encoder(self) -> Encoder | None:
        """Where the vision encoder can be read; None: nowhere, pruners that look into it are refused."""
        return None

    @property
    def whole_layers(self) -> int:
        """How many of the first decoder layers need every visual token that enters: nothing can be dropped in front of them."""
        return 0

    def shortened(self, arguments: Mapping[str, Any], keep: Tensor, index: Tensor, valid: Tensor) -> dict[str, Any]:
        """What else among the decoder's `arguments` follows the tokens, for those that stay; default: nothing.

        Args:
            arguments: of the decoder, unpruned.
            keep: [batch, length] bool, the columns that stay.
            index: [batch, new length] long, the column each new one takes.
            valid: [batch, new length] bool, False where a row is padded.
        """
        del arguments, keep, index, valid
        return {}

    @property
    def connector(self) -> nn.Module:
        """The module between vision encoder and LLM; default: where most families have it."""
        module: nn.Module = self.model.base_model.multi_modal_projector
        return module

    def fingerprint(self) -> str:
        """Hash of the connector: two models with the same fingerprint share their visual tokens' meaning.

        Weights are compared as bfloat16, so the same checkpoint loaded in another precision has the same fingerprint.
        """
        digest = hashlib.sha256(f"{self.family}:{self.hidden_size}".encode())
        for name, weight in sorted(self.connector.state_dict().items()):
            sample = weight.detach().flatten()[:4096].to("cpu", torch.bfloat16)
            digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]


def entering_tokens(
    adapter: VLMAdapter, call: Mapping[str, Any], embeddings: Tensor, position_ids: Tensor | None = None
) -> EnteringTokens:
    """The visual tokens of a call.

    Args:
        adapter: of the model that is called.
        call: keyword arguments of the base model's forward, `input_ids` [batch, length] among them.
        embeddings: [batch, length, d], what enters the decoder, or [n, d], the visual tokens among it.
        position_ids: what the decoder is given.
    """
    ids: Tensor = call["input_ids"]
    place = adapter.visual_mask(ids).flatten().nonzero().squeeze(1)
    if embeddings.ndim == 3:
        place = place.to(embeddings.device)
        embeddings = embeddings.flatten(0, 1).index_select(0, place)
    return EnteringTokens(place, embeddings, ids, call, position_ids)


def _items(
    entering: EnteringTokens, layouts: Sequence[Layout], mine: Tensor | None = None, is_video: bool = False
) -> list[tuple[int, Item]]:
    """Images or videos of these layouts, each with the number of its first token; `mine` [n] bool: which tokens are theirs.

    Raises:
        UserError: tokens are left over, or an item is torn apart, by a row's end or by another.
    """
    width, found, start = entering.input_ids.shape[1], [], 0
    numbers: Sequence[int] = range(len(entering)) if mine is None else mine.nonzero().flatten().tolist()
    if sum(map(len, layouts)) != len(numbers):
        raise UserError(NOT_WHOLE)
    for one in layouts:
        first, last = numbers[start], numbers[start + len(one) - 1]
        row = entering.places[first] // width
        if last - first != len(one) - 1 or entering.places[last] // width != row:
            raise UserError(NOT_WHOLE)
        found.append((first, Item(one, row, is_video)))
        start += len(one)
    return found


def _among(ids: Tensor, wanted: Sequence[int]) -> Tensor:
    """Which of `ids` are one of a few: bool of the same shape. Much faster than `torch.isin` on short sequences."""
    first, *others = [ids == one for one in wanted]
    return functools.reduce(torch.logical_or, others, first)
