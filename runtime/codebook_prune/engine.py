"""Dropping tokens inside an unmodified transformers model, with forward pre-hooks; those between layers are in `layers`.

How a call runs inside a block. A pre-hook on the base model learns the token ids; a pre-hook on the decoder scores the visual
embeddings that are about to enter layer 0 and shortens `inputs_embeds`, `position_ids` and `attention_mask`; kept tokens stay
in raster order and ragged rows are padded on the left. A hook behind the decoder ties a `CacheState` to the cache, so that
later calls on it (decode steps, beams, a second turn) may speak of the unpruned sequence, as `generate` does, while the cache
holds the pruned one.

Pruners inside the decoder act in `layers`; a cache pruned by them goes on only in a block with such a pruner.

What a caller sees. Masks and positions are always given as without pruning. The logits (and hidden states) of a call in which
images enter have the pruned length, the last token last; therefore `labels` are refused. In a block of `full_length` logits and
last hidden states have the caller's length instead, zeros where tokens were dropped, and labels that only a dropped token
predicts are ignored. The rows of a cache may be reordered among copies of one prompt (beams), not among prompts. A call in
which nothing is dropped is left untouched, bit for bit.
One block a model at a time, one thread a block.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.cache_state import (
    UNPRUNED,
    CacheState,
    attach_state,
    continued,
    counting_row,
    layer_length,
    numbered,
    positions_of,
    refuse_fixed_length,
    stages_of,
    state_of,
)
from codebook_prune.columns import gather_columns, ignore_unpredicted, join, packed, spread
from codebook_prune.encoder import EncoderTap
from codebook_prune.layers import Entered, LayerDrops
from codebook_prune.pruners.base import LayerPruner, Pruner
from codebook_prune.selection import EnteringImages, choose, entering_images
from codebook_prune.stats import PruneStats
from codebook_schemas import UserError

Arguments = dict[str, Any]


class Engine:
    """The hooks of one block, and what one call hands from one to the next."""

    def __init__(
        self, adapter: VLMAdapter, pruners: Sequence[Pruner | LayerPruner], stats: PruneStats, full_length: bool
    ) -> None:
        self.adapter, self.stats, self.full_length = adapter, stats, full_length
        self.pruners = tuple(pruner for pruner in pruners if isinstance(pruner, Pruner))
        self.drops = LayerDrops(adapter, [pruner for pruner in pruners if isinstance(pruner, LayerPruner)], stats)
        self.with_text = any(pruner.sees_text for pruner in self.pruners)
        self.encoder = EncoderTap(adapter) if any(pruner.sees_encoder for pruner in self.pruners) else None
        self.compact = adapter.numbers_in_line and any(pruner.positions == "compact" for pruner in self.pruners)
        self._names = {module: parameter_names(module) for module in (adapter.model, adapter.model.base_model)}
        self._call: Arguments | None = None
        self._state = UNPRUNED
        self._labels: Tensor | None = None
        self._drafted = 0
        self._left: tuple[Tensor, Tensor] | None = None  # the call's columns that enter, as `packed` gives them; None: all
        self._length = 0  # the call's columns before any drop

    def install(self, handles: list[Any]) -> None:
        """Put hooks and taps in place, what removes them into `handles`."""
        self.drops.install(handles)
        if self.encoder is not None:
            self.encoder.install(handles)
        model, decoder = self.adapter.model, self.adapter.decoder
        handles.append(model.register_forward_pre_hook(self.before_model, with_kwargs=True))
        handles.append(model.base_model.register_forward_pre_hook(self.before_base, with_kwargs=True))
        handles.append(decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True))
        handles.append(decoder.register_forward_hook(self.after_decoder, with_kwargs=True))

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> tuple[tuple[()], Arguments] | None:
        """Learn how many tokens behind the prompt are only drafted. Take labels over, to be ignored where tokens are dropped;
        refuse them where logits have the pruned length."""
        self._labels = None
        call = named(self._names[module], args, kwargs)
        asked = call.get("logits_to_keep")
        self._drafted = asked - 1 if isinstance(asked, int) and asked > 1 else 0
        if call.get("labels") is None:
            return None
        if not self.full_length:
            raise UserError("labels cannot be given while logits have the pruned length: prune with full_length=True")
        self._labels = call["labels"].clone()
        return (), call | {"labels": self._labels}

    def before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> tuple[tuple[()], Arguments]:
        """Learn the call; where `generate` resends tokens that a pruned cache already holds, cut them off."""
        call = named(self._names[module], args, kwargs)
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        if ids is None:
            raise UserError("inputs_embeds do not tell which tokens are visual: pass input_ids (and pixel_values) instead")
        refuse_fixed_length(call.get("past_key_values"))
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UserError("only a 2D attention_mask [batch, length] can be pruned")
        state, cached = state_of(call.get("past_key_values"))
        new = state.new_columns(cached, ids.shape[1], mask, counting_row(call.get("position_ids")))
        if new < ids.shape[1]:
            call["input_ids"] = ids[:, -new:]
            if call.get("position_ids") is not None:
                call["position_ids"] = call["position_ids"][..., -new:]
        self._call = call
        if self.adapter.own_masks and state.pruned:  # what it would make of the caller's mask is of the unpruned length
            return (), call | {"attention_mask": None, "token_type_ids": None}
        return (), call

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> tuple[tuple[()], Arguments] | None:
        """Shorten what enters layer 0; on a pruned cache, translate mask and positions."""
        call, self._call = self._call, None
        if call is None or args:
            raise UserError("inside a pruning block call the model, not its decoder")
        if self.adapter.own_masks:
            kwargs = kwargs | {"attention_mask": call.get("attention_mask")}
        state, cached = state_of(kwargs.get("past_key_values"))
        stages = stages_of(kwargs.get("past_key_values"))
        if stages and not self.drops.plan:
            raise UserError(
                "this cache was pruned inside the decoder: go on with it in a block with such a pruner, or a new one"
            )
        for held in stages.values():
            held.check_rows(len(kwargs["inputs_embeds"]))
        self._state, self._left, self._length, images = state, None, kwargs["inputs_embeds"].shape[1], None
        drafted = self._behind_prompt(call)
        kwargs = kwargs | numbered(call, kwargs, state, cached)
        changed = continued(kwargs, state, cached) if state.pruned else {}
        if brings_images(call):
            with self.stats.timed(kwargs["inputs_embeds"].device):
                embeds, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
                images = entering_images(
                    self.adapter, call, embeds, positions, drafted if self.with_text else None, self.encoder
                )
                chosen = None if images is None else self._choose(images, embeds)
                if chosen is not None:
                    embeds, keep = chosen
                    changed, self._state = self._shortened(kwargs | {"inputs_embeds": embeds}, keep, state, cached)
                    self._state = self._state.without(drafted)
        if changed and self.adapter.own_masks:
            changed["attention_mask"] = self.adapter.masks(kwargs | changed, self._types(call, cached))
        if self.drops.plan:
            self.drops.begin(self._entered(kwargs, changed, images, state, stages, drafted))
        return ((), kwargs | changed) if changed else None

    def after_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments, output: Any) -> None:
        """Tie what is known about the sequence to the cache that now holds it; restore the length where that is asked for."""
        stages, deeper = self.drops.finish()
        attach_state(getattr(output, "past_key_values", None), self._state, stages)
        left = deeper or self._left
        if self.full_length and left is not None:
            output.last_hidden_state = spread(output.last_hidden_state, *left, self._length)
            if self._labels is not None:
                ignore_unpredicted(self._labels, *left)
        self._left = self._labels = None

    def _behind_prompt(self, call: Arguments) -> int:
        """How many of the call's last tokens only follow its prompt: text drafted by prompt lookup or an assistant, whose
        logits are asked for beside those of the prompt's last. They choose nothing, stay, and may be cut off the cache."""
        drafted, self._drafted = self._drafted, 0
        ids, mask = call["input_ids"], call.get("attention_mask")
        if not 0 < drafted < ids.shape[1] or bool(self.adapter.visual_mask(ids[:, -drafted:]).any()):
            return 0
        return drafted if mask is None or bool(mask[:, -drafted:].all()) else 0

    def _types(self, call: Arguments, cached: int) -> Tensor | None:
        """The call's `token_type_ids` of the columns that enter the decoder."""
        types: Tensor | None = call.get("token_type_ids")
        if types is None:
            return None
        types = types[:, -self._length :]
        if cached:
            if bool(types.any()):
                raise UserError("a further image on a pruned cache is not supported for this model: start from a new cache")
            return None
        if self._left is not None:
            index, valid = self._left
            types = types.to(index.device).gather(1, index).masked_fill(~valid, 0)
        return types

    def _entered(
        self,
        kwargs: Arguments,
        changed: Arguments,
        images: EnteringImages | None,
        state: CacheState,
        stages: dict[int, CacheState],
        drafted: int,
    ) -> Entered:
        """The call as the decoder layers are told of it: `changed` is what differs from the caller's `kwargs`."""
        cached = layer_length(kwargs.get("past_key_values"))
        rows, columns = (kwargs | changed)["inputs_embeds"].shape[:2]
        mask = (kwargs | changed).get("attention_mask")
        device = kwargs["inputs_embeds"].device
        return Entered(
            prompt=cached == 0 or images is not None,
            given=kwargs.get("attention_mask"),
            length=self._length,
            index=None if self._left is None else self._left[0],
            valid=torch.ones(rows, columns, dtype=torch.bool, device=device)
            if mask is None
            else mask[:, -columns:].to(device, torch.bool),
            positions=changed["position_ids"] if changed else positions_of(kwargs, state, cached),
            images=images,
            state=state,
            stages=stages,
            drafted=drafted,
        )

    def _shortened(self, kwargs: Arguments, keep: Tensor, state: CacheState, cached: int) -> tuple[Arguments, CacheState]:
        """The decoder's arguments without the tokens `keep` [batch, length] leaves out, and the cache's state afterwards."""
        embeds = kwargs["inputs_embeds"]
        batch, length = keep.shape
        state.check_rows(batch)
        past, new = state.split_mask(kwargs.get("attention_mask"), cached, embeds.device)
        positions, shift = positions_of(kwargs, state, cached), state.shift
        if self.compact:
            closed = state.shift + (~keep if new is None else new & ~keep).cumsum(1)
            positions, shift = positions - closed, closed[:, -1:]
        keep = keep if new is None else new & keep
        index, valid, even = packed(keep)
        longest = index.shape[1]
        places = positions.gather(-1, index.expand(*positions.shape[:-1], -1))
        mask = join(past, valid, batch, cached, longest)  # always a mask: gaps alone could pass for packed sequences
        after = CacheState(batch, state.seen(cached) + length, cached + longest, None if past is None and even else mask, shift)
        changed = {
            "inputs_embeds": gather_columns(embeds, index),
            "position_ids": places if even else places.masked_fill(~valid, 0),
            "attention_mask": mask,
        }
        self._left = index, valid
        return changed | self.adapter.shortened(kwargs, keep, index, valid), after

    def _choose(self, images: EnteringImages, embeds: Tensor) -> tuple[Tensor, Tensor] | None:
        """Input embeddings of a call, merged where a pruner did so, and keep mask [batch, length] bool; None when everything
        stays. Counts."""
        chosen = choose(self.pruners, images) if self.pruners else None
        masks = None if chosen is None else chosen.masks
        after = images.lengths if masks is None else torch.stack([mask.sum() for mask in masks]).tolist()
        self.stats.count(images.layouts, after, masks)
        if chosen is None or after == images.lengths:
            return None
        keep = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        keep.view(-1).index_copy_(0, images.column, torch.cat(chosen.masks))
        if chosen.embeddings is not None:
            embeds = embeds.flatten(0, 1).index_copy(0, images.column, chosen.embeddings).view(embeds.shape)
        return embeds, keep


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of a module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return tuple(name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds)


def named(names: Sequence[str], args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """A call's arguments, all by name."""
    return dict(zip(names, args, strict=False)) | kwargs


def brings_images(call: Arguments) -> bool:
    """Whether visual embeddings enter in this call (a placeholder id alone, generated or resent, brings none)."""
    if call.get("pixel_values") is not None or call.get("pixel_values_videos") is not None:
        return True
    return any(out is not None for out in (call.get("mm_encoder_outputs") or {}).values())
