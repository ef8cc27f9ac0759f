"""What a key-value cache must remember once tokens were dropped in front of it, and calls on it, which speak of the unpruned
sequence, put into its terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from codebook_prune.columns import join
from codebook_schemas import UserError

Arguments = Mapping[str, Any]
ATTRIBUTE = "_codebook_prune_state"
STAGES = "_codebook_prune_stages"


@dataclass(frozen=True)
class CacheState:
    """The first `width` columns of the cache stand for the first `full` columns of the unpruned sequence; later ones are 1:1.

    rows: batch size. mask: [rows, width] bool, which of those columns are real (None: all). shift: [rows, 1] long, what
    compact positions subtract from unpruned ones (0 where they are not renumbered).
    """

    rows: int
    full: int
    width: int
    mask: Tensor | None
    shift: Tensor | int

    @property
    def pruned(self) -> bool:
        """Whether anything was dropped."""
        return self.full > 0

    def without(self, last: int) -> CacheState:
        """The state that leaves its `last` columns, all of them kept, to the later ones: the cache may be cut there."""
        if not last:
            return self
        mask = None if self.mask is None else self.mask[:, :-last]
        return replace(self, full=self.full - last, width=self.width - last, mask=mask)

    def on(self, device: torch.device) -> CacheState:
        """The state with its tensors on a device."""
        shift = self.shift.to(device) if isinstance(self.shift, Tensor) else self.shift
        return replace(self, mask=None if self.mask is None else self.mask.to(device), shift=shift)

    def seen(self, cached: int) -> int:
        """Unpruned columns that a cache of `cached` columns stands for."""
        return self.full + cached - self.width

    def check_rows(self, rows: int) -> None:
        """Refuse a call of another batch size than the cache's (raises UserError)."""
        if self.pruned and rows != self.rows:
            raise UserError(f"the cache was pruned with {self.rows} rows, this call has {rows}: start from a new cache")

    def new_columns(self, cached: int, length: int, mask: Tensor | None, positions: Tensor | None) -> int:
        """How many of the `length` token ids of a call are new to the cache.

        `generate` works out from the cache's length which tokens of a continued conversation are new, so on a pruned cache it
        resends as many old ones as were dropped. Its mask (or, without padding, its positions) still counts the whole
        unpruned sequence, which tells.

        Raises:
            UserError: mask or positions describe another sequence than the cache's.
        """
        if cached == 0:
            return length
        if mask is not None:
            total = mask.shape[1]
        elif self.pruned and length > 1 and positions is not None:
            total = int(positions.max()) + 1
        else:
            return length
        new = total - self.seen(cached)
        if new == length or (new >= 1 and new + self.full - self.width == length):
            return new
        raise UserError(
            f"the call describes {total} tokens, {length} of them new, but the cache stands for {self.seen(cached)}: "
            "give masks and positions as without pruning, with a cache filled inside such a block"
        )

    def split_mask(self, mask: Tensor | None, cached: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """An unpruned mask [rows, seen + new] as masks of the cache [rows, cached] and of the new columns (None: all True)."""
        mask = None if mask is None else mask.to(device, torch.bool)
        new = None if mask is None else mask[:, self.seen(cached) :]
        if cached == 0 or (self.mask is None and mask is None):
            return None, new
        rows = self.rows if self.mask is not None else len(mask) if mask is not None else 0
        start = torch.ones(rows, self.width, dtype=torch.bool, device=device) if self.mask is None else self.mask.to(device)
        rest = torch.ones(rows, cached - self.width, dtype=torch.bool, device=device)
        return torch.cat([start, rest if mask is None else mask[:, self.full : self.seen(cached)]], 1), new


UNPRUNED = CacheState(rows=0, full=0, width=0, mask=None, shift=0)


def state_of(cache: Any) -> tuple[CacheState, int]:
    """The state of a cache and its length; a missing or empty cache is unpruned.

    Raises:
        UserError: the cache was filled outside of a block, or cut into its pruned part.
    """
    cached = 0 if cache is None else int(cache.get_seq_length())
    if cached == 0:
        return UNPRUNED, 0
    state = getattr(cache, ATTRIBUTE, None)
    if not isinstance(state, CacheState):
        raise UserError("this cache was not filled inside a pruning block: pass a new one, or none")
    if cached < state.width:
        raise UserError("this cache was cropped into its pruned prompt: start from a new one")
    return state, cached


def stages_of(cache: Any) -> dict[int, CacheState]:
    """What the layers of a cache hold where that differs from layer 0: a state from each of these layers on, ascending.

    `shift` of these states is on top of layer 0's.

    Raises:
        UserError: the cache was cut into its pruned part.
    """
    stages: dict[int, CacheState] = {} if layer_length(cache) == 0 else getattr(cache, STAGES, {})
    if any(layer_length(cache, layer) < state.width for layer, state in stages.items()):
        raise UserError("this cache was cropped into its pruned prompt: start from a new one")
    return stages


def layer_length(cache: Any, layer: int = 0) -> int:
    """Columns that one layer of a cache holds; 0 without a cache."""
    return 0 if cache is None else int(cache.get_seq_length(layer))


def attach_state(cache: Any, state: CacheState, stages: dict[int, CacheState]) -> None:
    """Tie what is known to a cache, for as long as the cache lives (copies of the cache carry it along)."""
    if cache is not None:
        setattr(cache, ATTRIBUTE, state)
        setattr(cache, STAGES, stages)


def refuse_fixed_length(cache: Any) -> None:
    """Refuse static (compiled) caches: their length is fixed before it is known how many tokens stay (raises UserError)."""
    if cache is not None and getattr(cache, "is_compileable", False):
        raise UserError("a static cache cannot hold a pruned sequence: use the dynamic one (leave cache_implementation unset)")


def counting_row(positions: Tensor | None) -> Tensor | None:
    """Of a call's `position_ids` those that count tokens: [batch, length] as they are; of the four rows of M-RoPE (text, time,
    height, width) the first; None where there are none."""
    if positions is None or positions.ndim == 2:
        return positions
    return positions[0] if len(positions) == 4 else None


def positions_of(kwargs: Arguments, state: CacheState, cached: int) -> Tensor:
    """Positions [..., batch, length] of the unpruned sequence: those in the decoder's arguments, or what it would fill in."""
    embeds, given = kwargs["inputs_embeds"], kwargs.get("position_ids")
    if given is None:
        seen = state.seen(cached)
        return torch.arange(seen, seen + embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
    positions: Tensor = given.to(embeds.device).expand(*given.shape[:-2], len(embeds), -1)
    return positions


def numbered(call: Arguments, kwargs: Arguments, state: CacheState, cached: int) -> dict[str, Any]:
    """Positions that the base model, not the caller, worked out on a pruned cache, put right: it goes on from the cache's
    length, or numbers every column of the mask."""
    given = kwargs.get("position_ids")
    if not state.pruned or given is None or call.get("position_ids") is not None:
        return {}
    missed = 0 if call.get("attention_mask") is not None else state.seen(cached) - cached
    return {"position_ids": given[..., -kwargs["inputs_embeds"].shape[1] :] + missed}


def continued(kwargs: Arguments, state: CacheState, cached: int) -> dict[str, Any]:
    """The decoder's mask and positions in a call that drops nothing, on a cache that is pruned."""
    embeds = kwargs["inputs_embeds"]
    state.check_rows(len(embeds))
    past, new = state.split_mask(kwargs.get("attention_mask"), cached, embeds.device)
    mask = None if past is None and new is None else join(past, new, len(embeds), cached, embeds.shape[1])
    return {"attention_mask": mask, "position_ids": positions_of(kwargs, state, cached) - state.shift}
