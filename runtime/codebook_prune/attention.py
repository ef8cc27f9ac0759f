"""Reading queries and keys inside a decoder layer, and the attention rows that rank tokens.

One attention function is registered with transformers under a name of ours; it is used only by the layers that are tapped,
whose `self_attn` holds a shallow copy of the config that asks for it. It sees queries and keys after rotary embedding and
normalisation, notes them, and hands the call to the attention the model was loaded with. Masks are made from the decoder's own
config, the other layers do not notice.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from codebook_prune.adapters.loading import attention_function, register_attention
from codebook_schemas import UserError

NAME = "codebook_prune_tap"


class Tapped(Exception):  # noqa: N818 - not an error: it ends a dry run
    """Raised inside a dry run as soon as queries and keys are known."""


class Tap:
    """Notes what the attention of one decoder layer computes; `remove` leaves the layer as it was.

    query: [batch, heads, length, d]. key: [batch, key heads, cached + length, d]. Both None until the layer ran while `on`.
    """

    def __init__(self, layer: nn.Module, number: int) -> None:
        attention = getattr(layer, "self_attn", None)
        if not isinstance(attention, nn.Module) or not hasattr(attention, "config"):
            raise UserError(f"the attention of {type(layer).__name__} cannot be read: prune before layer 0 instead")
        self.layer, self.number, self.attention, self.config = layer, number, attention, attention.config
        self.on = self.dry = False
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.scaling = 1.0

    def install(self) -> None:
        """Put the tap in place."""
        register_attention(NAME, tapped_attention)
        tapped = copy.copy(self.config)
        vars(tapped).update(_attn_implementation_internal=NAME, _codebook_prune_tap=self)
        self.attention.config = tapped

    def remove(self) -> None:
        """Give the layer its own config back."""
        self.attention.config = self.config
        self.clear()

    def clear(self) -> None:
        """Forget queries and keys."""
        self.query = self.key = None
        self.on = self.dry = False

    def note(self, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """Keep what the layer is about to attend with."""
        self.query, self.key = query.detach(), key.detach()
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    @torch.no_grad()
    def dry_run(self, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Note what the layer would attend with, given its input [batch, length, d]: run it up to there, without the cache."""
        cache = kwargs.get("past_key_values")
        self.dry = True
        try:
            self.layer.forward(hidden, **kwargs | {"past_key_values": None, "use_cache": False, "attention_mask": None})
        except Tapped:
            pass
        finally:
            self.dry = False
        if self.query is None or self.key is None:
            return
        self.query, self.key = self.query.to(hidden.device), self.key.to(hidden.device)  # the layer may be on another device
        if cache is not None and cache.get_seq_length(self.number):
            self.key = torch.cat([cache.layers[self.number].keys.to(hidden.device), self.key], 2)


def tapped_attention(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What tapped layers call for their attention: note queries and keys, then the model's own attention."""
    tapped = module.config
    tap: Tap = vars(tapped)["_codebook_prune_tap"]
    if tap.on or tap.dry:
        tap.note(query, key, kwargs.get("scaling"))
    if tap.dry:
        raise Tapped
    function = attention_function(tap.config, module)
    module.config = tap.config  # attention functions may read it, too
    try:
        return function(module, query, key, *args, **kwargs)
    finally:
        module.config = tapped


def last_valid(valid: Tensor) -> Tensor:
    """Column [batch, 1] of the last True of each row of `valid` [batch, length]."""
    return valid.shape[1] - 1 - valid.flip(1).byte().argmax(1, keepdim=True)


def probabilities(query: Tensor, key: Tensor, scaling: float, allowed: Tensor) -> Tensor:
    """Attention [batch, heads, queries, keys] in float32, softmax over `allowed` [batch, queries, keys].

    Args:
        query: [batch, heads, queries, d].
        key: [batch, key heads, keys, d]; key heads divide heads (grouped-query attention).
        scaling: factor of the products.
        allowed: True where a query may look; rows without any come out uniform.
    """
    batch, heads, queries, d = query.shape
    groups = query.float().view(batch, key.shape[1], -1, d)
    logits = (groups @ key.float().transpose(2, 3)).view(batch, heads, queries, -1) * scaling
    return logits.masked_fill(~allowed.unsqueeze(1), torch.finfo(torch.float32).min).softmax(-1)


@torch.no_grad()
def last_row(tap: Tap, seen: Tensor, valid: Tensor) -> Tensor:
    """Attention [batch, heads, length] that the last valid token of each row pays to the call's columns, softmax over all.

    Args:
        tap: holds what the layer computed.
        seen: [batch, cached + length] bool, real columns among the keys.
        valid: [batch, length] bool, real columns of the call.
    """
    query, key = _noted(tap)
    length, last = valid.shape[1], last_valid(valid)
    row = query.gather(2, last[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    place = torch.arange(key.shape[2], device=key.device)
    allowed = seen & (place <= key.shape[2] - length + last)
    return probabilities(row, key, tap.scaling, allowed.unsqueeze(1))[:, :, 0, -length:]


@torch.no_grad()
def mean_of_visible_rows(tap: Tap, seen: Tensor, valid: Tensor, asking: Tensor) -> Tensor:
    """[batch, length]: the largest attention over heads, averaged over the queries `asking` that can see the column.

    Args:
        tap, seen, valid: as in `last_row`.
        asking: [batch, length] bool. A column that none of them can see gets 0.

    One head at a time; memory is batch x queries x keys, twice, in float32.
    """
    query, key = _noted(tap)
    length, group = valid.shape[1], query.shape[1] // key.shape[1]
    queries = asking.any(0).nonzero().squeeze(1)
    query, asking = query[:, :, queries], asking[:, queries]
    place = torch.arange(key.shape[2], device=key.device)
    allowed = seen.unsqueeze(1) & (place <= place[-length:][queries, None])
    largest = query.new_zeros(len(query), len(queries), key.shape[2], dtype=torch.float32)
    for head in range(query.shape[1]):
        one = probabilities(query[:, head : head + 1], key[:, head // group, None], tap.scaling, allowed)
        largest = torch.maximum(largest, one[:, 0])
    asked = (asking.unsqueeze(2) & allowed)[:, :, -length:]
    total = (largest[:, :, -length:] * asked).sum(1)
    return total / asked.sum(1).clamp(min=1)


def _noted(tap: Tap) -> tuple[Tensor, Tensor]:
    if tap.query is None or tap.key is None:
        raise UserError(
            "a decoder layer ran without the attention it was asked to show: only transformers models are supported"
        )
    return tap.query, tap.key
