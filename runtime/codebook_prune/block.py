"""The block in which a model is pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from codebook_prune.adapters.base import VLMAdapter
from codebook_prune.adapters.loading import adapter_for
from codebook_prune.engine import Engine
from codebook_prune.pruners.base import LayerPruner, Pruner
from codebook_prune.stats import PruneStats
from codebook_schemas import UserError


@contextmanager
def pruned(
    model: Any, pruners: Sequence[Pruner | LayerPruner], stats: PruneStats, full_length: bool = False
) -> Iterator[PruneStats]:
    """A block in which every call of `model` is pruned; leaving it, also by an exception, removes every trace.

    Args:
        model: a transformers vision-language model of a supported family.
        pruners: applied in this order, each to what the one before kept; those inside the decoder layer by layer.
        stats: reset, filled, and yielded.
        full_length: give last hidden states and logits the caller's length, so that `labels` can be given.

    Raises:
        UserError: unsupported model type, sliding-window or chunked attention, a pruner that does not fit the model, or a model
            that is already in such a block.
    """
    adapter = adapter_for(model)
    _check_attention(adapter, pruners)
    hooks = adapter.decoder._forward_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), Engine) for hook in hooks):
        raise UserError("this model is already being pruned: leave that block first, or chain the pruners with |")
    for pruner in pruners:
        if isinstance(pruner, Pruner):
            pruner.check(adapter)
    engine = Engine(adapter, pruners, stats, full_length)
    stats.reset(len(engine.drops.layers))
    handles: list[Any] = []
    try:
        engine.install(handles)
        yield stats
    finally:
        for handle in handles:
            handle.remove()


def _check_attention(adapter: VLMAdapter, pruners: Sequence[Pruner | LayerPruner]) -> None:
    """Refuse decoders whose masks count columns, not positions, where that makes a difference."""
    if adapter.own_masks:
        if not all(isinstance(pruner, Pruner) and pruner.positions == "compact" for pruner in pruners):
            raise UserError(
                f"{adapter.family} has sliding-window layers: only pruners in front of layer 0 with positions='compact' fit it"
            )
        return
    config = adapter.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    windowed = any(getattr(config, name, None) is not None for name in ("sliding_window", "attention_chunk_size"))
    if windowed if kinds is None else any(kind != "full_attention" for kind in kinds):
        raise UserError("this model has sliding-window or chunked attention layers, which cannot be pruned")
