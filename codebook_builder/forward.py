"""Answers of a decoder to many runs behind one shared, cached prefix."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codebook_builder.costs import DecoderCost, behind_attention
from codebook_builder.memory import ran_out
from codebook_builder.runs import Runs, Table
from codebook_prune.adapters.base import VLMAdapter
from codebook_schemas import UserError


class SharedPrefix:
    """Keys and values of positions every run begins with: one sequence for all, or one of each image. Runs that use it do not
    change it."""

    def __init__(self, cache: Any) -> None:
        """Take over a decoder's output cache of batch 1, or of one row an image.

        Raises:
            UserError: a layer's cache is not the plain, growing kind (sliding windows and linear attention forget what a
                shorter prefix would need).
        """
        kinds = {type(layer).__name__ for layer in cache.layers} - {"DynamicLayer"}
        if kinds:
            raise UserError(f"probing needs full attention in every layer; this model also has {', '.join(sorted(kinds))}")
        self._cache = cache

    def rows(self, length: int, image: Tensor) -> Any:
        """A cache holding the first `length` positions for runs of these images [m], without copying them.

        Its layers hand (shared, new) keys and values to the attention and forget the new ones, so one forward pass holds the
        joined keys and values of one layer at a time, not of all.
        """
        view = self.growing(length)
        for layer in view.layers:
            layer.update = partial(_joined, layer.keys, layer.values, image)
        return view

    def growing(self, length: int, rows: int | None = None) -> Any:
        """A cache that starts with the first `length` positions, of one sequence for `rows` runs, and keeps what is added."""
        grown = copy.copy(self._cache)
        grown.layers = [copy.copy(layer) for layer in self._cache.layers]
        for layer in grown.layers:
            keys, values = layer.keys[:, :, :length], layer.values[:, :, :length]
            layer.keys, layer.values = (t if rows is None else t.expand(rows, -1, -1, -1) for t in (keys, values))
        return grown


def _joined(
    keys: Tensor, values: Tensor, image: Tensor, new_keys: Tensor, new_values: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    pairs = ((keys, new_keys), (values, new_values))
    joined = [torch.cat([_of_each(shared, image), new], dim=-2) for shared, new in pairs]
    return joined[0], joined[1]


def _of_each(shared: Tensor, image: Tensor) -> Tensor:
    return shared.expand(len(image), -1, -1, -1) if len(shared) == 1 else shared.index_select(0, image)


@contextmanager
def last_position_only(decoder: Any) -> Iterator[None]:
    """While open, the last layer's output projection and MLP are computed for the last position only.

    Nothing but the last position is read from the last layer, and its keys and values are made before these two modules. Their
    single row is added to the residual of every position, which leaves the last one exact and the others meaningless.
    """
    handles = [m.register_forward_pre_hook(_last_position) for m in behind_attention(decoder.layers[-1])]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_position(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0][:, -1:].contiguous(), *args[1:])  # a view would be multiplied row by row


Shape = tuple[int, int, int]
"""Of a batch: positions in front that are cached, runs, computed positions of each."""


class ReadOut:
    """Logits of the last position of many runs, batched under a budget of positions (rows x computed length).

    `tokens_computed` counts every position that went through the decoder, `rows_computed` every run, `flops` what they cost,
    `memory_splits` how often a batch was halved because memory ran out. Use it inside `last_position_only`.
    """

    def __init__(self, adapter: VLMAdapter, head: Any, tokens_per_batch: int) -> None:
        """Take the adapter of a model, its LM head and the budget; a single run may exceed the budget."""
        self._adapter, self._decoder, self._head, self.budget = adapter, adapter.decoder, head, tokens_per_batch
        self._cost = DecoderCost.of(self._decoder, head, trimmed=True)
        self._too_large: set[Shape] = set()
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.tokens_computed = self.rows_computed = self.memory_splits = 0
        self.flops = 0.0

    def is_too_large(self, shape: Shape) -> bool:
        """Whether memory ran out for it before."""
        return shape in self._too_large

    def give_up(self, shape: Shape) -> None:
        """Memory ran out: this is to be halved, now and from now on."""
        self._too_large.add(shape)
        self.memory_splits += 1
        if self._head.weight.is_cuda:
            torch.cuda.empty_cache()

    def extend(self, prefix: SharedPrefix | None, length: int, table: Table, runs: Runs) -> tuple[SharedPrefix | None, Tensor]:
        """Do one run an image [m, q] behind the first `length` positions of a `prefix` of one sequence (None: from nothing).

        Returns:
            The prefix of every image, grown to length + q positions (None: this kind shares nothing), and the last position's
            logits [m, V].
        """
        cache = None if prefix is None else prefix.growing(length, len(runs.index))
        out = self._run(table, runs.to(table.embeddings.device), cache)
        self._count(length, *runs.index.shape)
        return SharedPrefix(out.past_key_values), self._head(out.last_hidden_state[:, -1])

    def logits(self, prefix: SharedPrefix | None, length: int, table: Table, runs: Runs) -> Iterator[tuple[slice, Tensor]]:
        """Last-position logits of runs [m, q] over a table, behind `length` prefix positions.

        Yields (rows, logits [rows, V]) a batch at a time and in order, so that no more than a batch's logits are ever held.

        Raises:
            RuntimeError: memory does not suffice for a single run.
        """
        rows = max(1, self.budget // runs.index.shape[1])
        first = 0
        for part in runs.to(table.embeddings.device).split(math.ceil(len(runs.index) / rows)):
            yield from self._attempt(prefix, length, table, part, first)
            first += len(part.index)

    def _attempt(
        self, prefix: SharedPrefix | None, length: int, table: Table, runs: Runs, first: int
    ) -> Iterator[tuple[slice, Tensor]]:
        # A batch shape that once failed is halved at once the next time, exactly as it was after failing; other shapes are
        # still tried. So how an image is batched, and every bit of its scores, does not depend on the images before it.
        shape: Shape = (length, *runs.index.shape)
        if not self.is_too_large(shape):
            try:
                found = self._forward(prefix, length, table, runs)
            except RuntimeError as error:
                if len(runs.index) == 1 or not ran_out(error):
                    raise
            else:
                yield slice(first, first + len(runs.index)), found
                return
            self.give_up(shape)
        for half in runs.split(2):
            yield from self._attempt(prefix, length, table, half, first)
            first += len(half.index)

    def _forward(self, prefix: SharedPrefix | None, length: int, table: Table, runs: Runs) -> Tensor:
        out = self._run(table, runs, None if prefix is None else prefix.rows(length, runs.image))
        logits: Tensor = self._head(out.last_hidden_state[:, -1])
        self._count(length, *runs.index.shape)
        return logits

    def _run(self, table: Table, runs: Runs, cache: Any) -> Any:
        features = None if table.features is None else table.features[runs.index]
        where = self._adapter.placed(runs.place, features)
        return self._decoder(inputs_embeds=table.embeddings[runs.index], past_key_values=cache, use_cache=True, **where)

    def _count(self, shared: int, rows: int, computed: int) -> None:
        self.rows_computed += rows
        self.tokens_computed += rows * computed
        self.flops += rows * self._cost.run(shared, computed)


class ApartReadOut(ReadOut):
    """The same where image tokens see each other (Gemma 3): what stands before an ablated token changes with it, so nothing is
    shared. Every run begins with the prompt's first token, `prefix` and `length` are not looked at, and `Table.visual` says
    which columns are an image's."""

    def extend(self, prefix: SharedPrefix | None, length: int, table: Table, runs: Runs) -> tuple[None, Tensor]:
        """See `ReadOut.extend`."""
        return None, self._forward(None, 0, table, runs.to(table.embeddings.device))

    def _forward(self, prefix: SharedPrefix | None, length: int, table: Table, runs: Runs) -> Tensor:
        return super()._forward(None, 0, table, runs)

    def _run(self, table: Table, runs: Runs, cache: Any) -> Any:
        if table.visual is None:
            raise ValueError("the table does not say which rows are visual")
        types = table.visual[runs.index]
        call = {"inputs_embeds": table.embeddings[runs.index], "attention_mask": torch.ones_like(types, dtype=torch.bool)}
        return self._decoder(
            inputs_embeds=call["inputs_embeds"], attention_mask=self._adapter.masks(call, types.long()), use_cache=False
        )
