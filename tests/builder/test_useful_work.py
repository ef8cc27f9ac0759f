"""What a prober computes and holds, seen from outside: PyTorch's FLOP counter, hooks on the decoder and on the LM head."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from conftest import noise_image
from test_probe import config, tiny
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from codebook_builder.probe import Prober


def test_no_product_is_computed_that_is_not_counted_as_useful() -> None:
    """Every run's own positions through the layers, one of each through the rest of the last and the head, and nothing else.

    Only the decoder has matrices without a bias, which PyTorch calls mm.
    """
    prober = Prober(*tiny(), config(), None)
    prompts = [prober.prepare(noise_image(seed)) for seed in (0, 1)]
    prober._read._cost = replace(prober._read._cost, pair=0.0)
    prober._read.reset()
    with FlopCounterMode(display=False) as counter:
        prober.probe_prepared(prompts, ["a", "b"])
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == prober.counters.flops


def test_batches_keep_their_budget_and_logits_do_not_pile_up() -> None:
    model, processor = tiny()
    shapes: list[tuple[int, int]] = []
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def enters(module: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    def leaves(module: Any, args: Any, logits: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(logits))
        most = max(most, sum(ref() is not None for ref in alive))

    handles = [
        model.get_decoder().register_forward_pre_hook(enters, with_kwargs=True),
        model.get_output_embeddings().register_forward_hook(leaves),
    ]
    try:
        prober = Prober(model, processor, config(tokens_per_batch=100), None)
        prober.probe([noise_image(seed) for seed in range(6)], list("abcdef"))
    finally:
        for handle in handles:
            handle.remove()
    assert all(rows == 1 or rows * length <= 100 for rows, length in shapes)
    assert sum(rows > 1 for rows, _ in shapes) >= 10
    assert len(alive) == len(shapes)
    assert most <= 3  # the batch at hand, the one before it, and the whole image's answer
