"""Dropping tokens between decoder layers: pre-hooks on the layers that rank, gather, and replay new masks and positions.

The decoder's loop hands the same mask and the same rotary embedding to every layer. From the first drop on, each layer is given
its own instead, sized by its own cache, at the prompt and at every later step. Each layer's cache keeps its own length; what
it stands for is a `CacheState` per stage, tied to the cache beside that of layer 0. Columns are counted as they enter layer 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.adapters.loading import causal_mask
from codebook_prune.attention import Tap
from codebook_prune.cache_state import CacheState, layer_length
from codebook_prune.columns import gather_columns, join, packed
from codebook_prune.layer_view import LayerView, last_column
from codebook_prune.pruners.base import LayerPruner
from codebook_prune.selection import EnteringImages
from codebook_prune.stats import PruneStats
from codebook_schemas import UserError

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Entered:
    """One call as it enters layer 0, after any drop in front of it.

    prompt: whether this call may drop. given: the caller's mask [batch, seen + length], of the unpruned sequence. length: the
    call's columns before any drop. index: [batch, columns] long, which of these enter (None: all). valid: [batch, columns]
    bool. positions: [batch, columns] long. images: those of the call. state, stages: of the cache before the call. drafted: how
    many of the last columns are text that only follows the prompt: it ranks nothing and stays.
    """

    prompt: bool
    given: Tensor | None
    length: int
    index: Tensor | None
    valid: Tensor
    positions: Tensor
    images: EnteringImages | None
    state: CacheState
    stages: dict[int, CacheState]
    drafted: int = 0

    @property
    def asking(self) -> Tensor:
        """[batch, columns] bool: the prompt's valid columns."""
        if not self.drafted:
            return self.valid
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        return self.valid & (columns < len(columns) - self.drafted)


class LayerDrops:
    """The hooks on decoder layers of one block, and what one call hands from layer to layer."""

    def __init__(self, adapter: VLMAdapter, pruners: Sequence[LayerPruner], stats: PruneStats) -> None:
        self.decoder, self.stats, self.renumber = adapter.decoder, stats, adapter.numbers_in_line
        self.layers: Sequence[nn.Module] = list(self.decoder.layers)  # type: ignore[arg-type]
        self.plan: dict[int, list[tuple[LayerPruner, Tap]]] = {}
        self.taps: dict[int, Tap] = {}
        self._previous: set[int] = set()
        for pruner in pruners:
            for layer, attention in pruner.plan(len(self.layers)).items():
                if layer < adapter.whole_layers:
                    raise UserError(
                        f"the first {adapter.whole_layers} decoder layers of {adapter.family} need every visual token: drop in "
                        f"front of layer {adapter.whole_layers} or later, not {layer}, or before layer 0"
                    )
                read = layer - 1 if attention == "previous" else layer
                self.taps.setdefault(read, Tap(self.layers[read], read))
                self.plan.setdefault(layer, []).append((pruner, self.taps[read]))
                self._previous |= {read} if attention == "previous" else set()
        self._call: Entered | None = None

    def install(self, handles: list[Any]) -> None:
        """Put hooks and taps in place, what removes them into `handles`."""
        for tap in self.taps.values():
            handles.append(tap)
            tap.install()
        for number, layer in enumerate(self.layers if self.plan else ()):
            handles.append(layer.register_forward_pre_hook(partial(self.before_layer, number), with_kwargs=True))

    def begin(self, call: Entered) -> None:
        """Take over a call that is about to enter layer 0."""
        self._call = call
        self._now: Arguments | None = None  # what the layers of this stage are given instead of the decoder's arguments
        self._valid, self._even = call.valid, False  # of the columns alive; whether all are known to be valid
        self._positions = call.positions  # of the entering columns
        self._column: Tensor | None = None  # [batch, alive] which entering column each is; None: all, in place
        self._closed: Tensor | None = None  # [batch, columns] gaps closed in front of each by compact drops
        self._stages, self._kept = dict(call.stages), list[tuple[int, Tensor]]()
        self._visual, self._image = _candidates(call)
        self._prompt = call.asking
        text, pictured = self._prompt & (self._image < 0), self._image >= 0
        self._number = text.cumsum(1).sub_(1).masked_fill_(~text, -1)  # of text tokens among themselves
        self._beside = torch.zeros_like(text)
        self._beside[:, 1:] |= pictured[:, :-1]
        self._beside[:, :-1] |= pictured[:, 1:]
        self._beside &= text
        for number, tap in self.taps.items():
            tap.clear()
            tap.on = call.prompt and number in self._previous

    def finish(self) -> tuple[dict[int, CacheState], tuple[Tensor, Tensor] | None]:
        """End the call: count, forget it.

        Returns:
            What the cache's layers now hold; which of the call's columns left the last layer, as `packed` gives them (None:
            none was dropped between layers).
        """
        call, self._call = self._call, None
        for tap in self.taps.values():
            tap.clear()
        if call is None:
            return {}, None
        if call.prompt and self.plan:
            self._count(call)
        left = None
        if self._column is not None:
            column = self._column
            left = column if call.index is None else call.index.to(column.device).gather(1, column), self._valid
        self._now = self._column = self._closed = None
        self._kept = []
        return dict(sorted(self._stages.items())), left

    def before_layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        """Drop in front of a layer where the plan says so; give it the arguments of its stage."""
        call = self._call
        if call is None:
            return None
        hidden = args[0]
        self._follow(hidden.device)
        if number in call.stages:
            self._now = self._stage(call, number, hidden, kwargs)
        if call.prompt and number in self.plan:
            with self.stats.timed(hidden.device):
                hidden = self._drop(call, number, self.plan[number], hidden, kwargs | (self._now or {}))
                if self._column is not None:
                    self._now = self._stage(call, number, hidden, kwargs)
        return None if self._now is None else ((hidden, *args[1:]), kwargs | self._now)

    def _follow(self, device: torch.device) -> None:
        """Where layers are spread over devices, take along to the next one what the call hands on."""
        if self._valid.device == device:
            return
        for name in ("_prompt", "_valid", "_positions", "_visual", "_image", "_number", "_beside", "_column", "_closed"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))

    def _drop(
        self, call: Entered, number: int, planned: list[tuple[LayerPruner, Tap]], hidden: Tensor, kwargs: Arguments
    ) -> Tensor:
        """What is left of the layer's input [batch, alive, d] after its pruners."""
        entering = (self._prompt, self._visual, self._image, self._number, self._beside)
        asking, visual, image, texts, beside = (x if self._column is None else x.gather(1, self._column) for x in entering)
        asking = asking & self._valid
        text, entered, spoken = asking & (image < 0), self._visual.sum(1), self._number.amax(1) + 1
        texts = texts.masked_fill(~asking, -1)
        gone = torch.zeros_like(self._valid)
        closing = [torch.zeros_like(gone)]
        for pruner, tap in planned:
            if tap.number == number:
                tap.dry_run(hidden, kwargs)
            view = LayerView(
                layer=number, depth=len(self.layers), valid=asking, visual=visual & asking, text=text,
                entered=entered, number=texts, texts=spoken, beside=beside, seen=self._seen(call, tap), tap=tap,
            ).without(gone)  # fmt: skip
            more = asking & ~gone & ~pruner.keep(view) & ~last_column(asking)
            gone = gone | more
            closing += [more] if pruner.positions == "compact" and self.renumber else []
        if not bool(gone.any()):
            return hidden
        if len(closing) > 1:
            self._close(torch.stack(closing).any(0))
        index, self._valid, self._even = packed(self._valid & ~gone)
        self._column = index if self._column is None else self._column.gather(1, index)
        kept = torch.zeros_like(self._visual).scatter_(1, self._column, self._valid)
        self._kept.append((number, kept))
        return gather_columns(hidden, index)

    def _seen(self, call: Entered, tap: Tap) -> Tensor:
        """[batch, cached + alive] bool: which of the keys that `tap` read are real."""
        rows, alive = self._valid.shape
        cached = 0 if tap.key is None else tap.key.shape[2] - alive
        past, _ = self._before(call, tap.number).split_mask(call.given, cached, self._valid.device)
        return join(past, self._valid, rows, cached, alive)

    def _close(self, gone: Tensor) -> None:
        """Note that the positions behind the alive columns `gone` move up."""
        if self._column is not None:
            gone = torch.zeros_like(self._visual).scatter_(1, self._column, gone)
        closed = gone.cumsum(1)
        self._closed = closed if self._closed is None else self._closed + closed

    def _before(self, call: Entered, number: int) -> CacheState:
        """What a layer's cache stands for as the call begins."""
        last = max((layer for layer in call.stages if layer <= number), default=None)
        return replace(call.state, shift=0) if last is None else call.stages[last]

    def _stage(self, call: Entered, number: int, hidden: Tensor, kwargs: Arguments) -> Arguments:
        """Mask and positions of a layer and those behind it; notes what their caches will hold."""
        state, cached = self._before(call, number).on(hidden.device), layer_length(kwargs.get("past_key_values"), number)
        rows, length = hidden.shape[:2]
        state.check_rows(rows)
        past, _ = state.split_mask(call.given, cached, hidden.device)
        full = past is None and (self._even or (not call.prompt and call.given is None))
        mask = None if full else join(past, self._valid, rows, cached, length)
        if self._column is not None or call.index is not None:
            shift = state.shift if self._closed is None else state.shift + self._closed[:, -1:]
            after = CacheState(rows, state.seen(cached) + call.length, cached + length, mask, shift)
            self._stages[number] = after.without(call.drafted)
        return {
            "attention_mask": causal_mask(self.decoder.config, hidden, mask, kwargs.get("past_key_values"), number),
            "position_embeddings": self._rotary(state, hidden, kwargs["position_embeddings"]),
            "position_ids": None,
        }

    def _rotary(self, state: CacheState, hidden: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(cos, sin) of the alive columns: the decoder's own, or those of the renumbered positions."""
        if self._closed is None and not isinstance(state.shift, Tensor):
            if self._column is None:
                return given
            return tuple(gather_columns(x.to(hidden.device).expand(len(hidden), -1, -1), self._column) for x in given)
        positions = self._positions - state.shift
        if self._closed is not None:
            positions = positions - self._closed
        if self._column is not None:
            positions = positions.gather(1, self._column)
        positions = positions.masked_fill(~self._valid, 0)
        rotary: tuple[Tensor, ...] = self.decoder.rotary_emb(hidden, position_ids=positions)  # type: ignore[operator]
        return rotary

    def _count(self, call: Entered) -> None:
        """Add to the statistics what was dropped inside the decoder in this call."""
        text = self._prompt & (self._image < 0)
        steps = [(0, call.valid.to(text.device)), *((layer, kept.to(text.device)) for layer, kept in self._kept)]
        self.stats.count_text(*torch.stack([text.sum(1), (text & steps[-1][1]).sum(1)]).tolist())
        if call.images is None:
            return
        images = torch.arange(len(call.images.lengths), device=text.device)
        counts = torch.stack([(self._image[keep].unsqueeze(1) == images).sum(0) for _, keep in steps])
        final = torch.zeros(len(text), call.length, dtype=torch.bool, device=text.device)
        place = torch.arange(call.length).expand(len(text), -1) if call.index is None else call.index
        final.scatter_(1, place.to(text.device), steps[-1][1])
        kept = list(torch.split(final.view(-1)[call.images.column.to(text.device)], call.images.lengths))
        self.stats.deepen([layer for layer, _ in steps], counts.tolist(), kept)


def _candidates(call: Entered) -> tuple[Tensor, Tensor]:
    """Of the entering columns [batch, columns]: which may be dropped as visual tokens; the image of each, -1 for text."""
    visual = torch.zeros(len(call.valid), call.length, dtype=torch.bool, device=call.valid.device)
    image = torch.full(visual.shape, -1, device=visual.device)
    if call.images is not None:
        lengths = torch.tensor(call.images.lengths, device=visual.device)
        image.view(-1)[call.images.column] = torch.arange(len(lengths), device=visual.device).repeat_interleave(lengths)
        scored = torch.cat([one.position[:, 0] for one in call.images.layouts]) >= 0
        visual.view(-1)[call.images.column] = scored.to(visual.device)
    if call.index is not None:
        visual, image = visual.gather(1, call.index), image.gather(1, call.index)
    return visual & call.valid, image
