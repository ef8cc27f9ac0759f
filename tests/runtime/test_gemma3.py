"""Gemma 3, whose image tokens see each other and whose layers have windows: against masks and rows made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise_image
from families import IMAGE, SIDE, SQUARE, TEXT, Family, Prompt, grid, item, noise, prompts_of, ready, siglip
from oracle import ProjectionPruner
from test_engine_rules import same, trace
from test_families import close, generate
from test_probe import assert_scores, config
from test_probe_families import SETTINGS, HandMade, oracle
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from codebook_builder.probe import Prober
from codebook_prune import FastVPruner, UserError

WINDOW, STEPS = 7, 3


def gemma3(attention: str) -> Family:
    text = Gemma3TextConfig(
        **{key: value for key, value in TEXT.items() if key != "initializer_range"}, head_dim=16, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2, initializer_range=0.1, query_pre_attn_scalar=16,
    )  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=siglip(), mm_tokens_per_image=SQUARE**2, image_token_index=IMAGE)
    config.tie_word_embeddings = False
    model = ready(Gemma3ForConditionalGeneration, config, attention)
    model.model.multi_modal_projector.mm_input_projection_weight.data.copy_(noise(1, 32, 64))  # made as zeros
    images = [item(IMAGE, {"pixel_values": noise(70 + i, 1, 3, SIDE, SIDE)}, grid(0, SQUARE, SQUARE)) for i in range(3)]
    return Family("gemma3", model, prompts_of(images[:1], images[1:]))


FAMILIES = {attention: gemma3(attention) for attention in ("sdpa", "eager")}
each = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


def inputs_of(family: Family, prompts: Any) -> dict[str, Any]:
    inputs = family.inputs(prompts)
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


@torch.no_grad()
def plain_logits(model: Any, embeds: Tensor, blocks: list[int]) -> Tensor:
    """Logits [length, vocabulary] of one row; `blocks`: the image of each column, -1 for text."""
    n = embeds.shape[1]
    full = torch.zeros(1, 1, n, n, dtype=torch.bool)
    sliding = full.clone()
    for q in range(n):
        for k in range(n):
            full[0, 0, q, k] = k <= q or (blocks[q] >= 0 and blocks[q] == blocks[k])
            sliding[0, 0, q, k] = full[0, 0, q, k] and q - k < WINDOW
    masks: dict[str, Any] = {"full_attention": full, "sliding_attention": sliding}
    if model.config._attn_implementation == "eager":
        masks = {name: torch.zeros(1, 1, n, n).masked_fill(~mask, -1e30) for name, mask in masks.items()}
    hidden = model.get_decoder()(
        inputs_embeds=embeds, position_ids=torch.arange(n)[None], attention_mask=masks, use_cache=False
    )
    return model.lm_head(hidden.last_hidden_state)[0]


def row_of(family: Family, p: Any, budgets: list[int]) -> tuple[Tensor, list[int]]:
    embeds = torch.stack(family.row(p, budgets).vectors)[None]
    blocks, number = [-1] * 3, 0
    for number, (one, budget) in enumerate(zip(p.items, budgets, strict=True)):
        blocks += [number] * min(budget, len(one.cells)) + [-1] * 3
    return embeds, blocks + [-1] * (embeds.shape[1] - len(blocks))


@each
def test_every_step_equals_rows_and_masks_by_hand(family: Family) -> None:
    prompts, budgets = family.prompts, [[], [9], [5, 12]]
    inputs = inputs_of(family, prompts)
    with torch.no_grad():
        plain = family.model(**inputs).logits
    with ProjectionPruner(keep_tokens=(9, 5, 12))(family.model) as stats:
        out = generate(family.model, inputs)
        with torch.no_grad():
            logits = family.model(**inputs).logits
    assert stats.tokens_after == [9, 5, 12] * 2
    for i, (p, budget) in enumerate(zip(prompts, budgets, strict=True)):
        embeds, blocks = row_of(family, p, budget)
        assert close(logits[i, -embeds.shape[1] :], plain_logits(family.model, embeds, blocks))
        whole, all_blocks = row_of(family, p, [99] * len(budget))
        assert close(plain[i, -whole.shape[1] :], plain_logits(family.model, whole, all_blocks))  # the oracle is the model
        if budget:  # and image tokens do see each other
            assert not close(plain_logits(family.model, embeds, [-1] * len(blocks))[-1], logits[i, -1])
        for step in range(STEPS):
            reference = plain_logits(family.model, embeds, blocks)[-1]
            assert close(out.logits[step][i], reference)
            token = int(reference.argmax())
            assert int(out.sequences[i, inputs["input_ids"].shape[1] + step]) == token
            more = family.model.get_input_embeddings()(torch.tensor([[token]]))
            embeds, blocks = torch.cat([embeds, more], 1), [*blocks, -1]


@each
def test_keep_all_is_exact_and_the_model_is_restored(family: Family) -> None:
    inputs = inputs_of(family, family.prompts)
    answer, before = generate(family.model, inputs), trace(family.model)
    with ProjectionPruner(keep_ratio=1.0)(family.model):
        kept = generate(family.model, inputs)
    assert torch.equal(kept.sequences, answer.sequences)
    assert all(torch.equal(a, b) for a, b in zip(kept.logits, answer.logits, strict=True))
    assert same(before, trace(family.model))


@each
@torch.no_grad()
def test_a_second_turn_goes_on_with_the_pruned_cache(family: Family) -> None:
    p, more = family.prompts[1], [7, 8, 9]
    with ProjectionPruner(keep_tokens=4)(family.model):
        cache = family.model(**inputs_of(family, [p])).past_key_values
        logits = family.model(input_ids=torch.tensor([more]), past_key_values=cache).logits
        with pytest.raises(UserError, match="further image on a pruned cache"):
            family.model(**inputs_of(family, [p]) | {"attention_mask": None}, past_key_values=cache)
    embeds, blocks = row_of(family, p, [4])
    embeds = torch.cat([embeds, family.model.get_input_embeddings()(torch.tensor([more]))], 1)
    assert close(logits[0], plain_logits(family.model, embeds, blocks + [-1] * 3)[-3:])


@pytest.mark.parametrize("pruner", [FastVPruner(keep_ratio=0.5), ProjectionPruner(keep_tokens=3, positions="original")])
def test_what_windows_make_ambiguous_is_refused(pruner: Any) -> None:
    model = FAMILIES["sdpa"].model
    with pytest.raises(UserError, match="gemma3 has sliding-window layers: only pruners in front of layer 0"), pruner(model):
        pass


@each
@pytest.mark.parametrize("ablation", ["replace", "drop"])
def test_probing_shares_nothing_and_equals_one_forward_per_experiment(family: Family, ablation: str) -> None:
    processor = HandMade(family, Prompt((family.prompts[1].items[0],), 9))
    answers = oracle(
        family, family.inputs([processor.prompt]), ablation,
        lambda model, embeds, shown: plain_logits(model, embeds, [int(one) - 1 for one in shown]),
    )  # fmt: skip
    prober = Prober(family.model, processor, config(ablation=ablation, **SETTINGS), None)
    found = prober.probe([noise_image(0)], ["a"])[0]
    assert found.token.tolist() == list(range(SQUARE**2))
    assert_scores(found, answers, "jsd")
    cascade = Prober(family.model, processor, config(ablation=ablation, cascade=True, **SETTINGS), (1.0, 1e-9))
    again = cascade.probe([noise_image(0)], ["a"])[0]
    assert np.isnan(again.global_divergence).any()
    np.testing.assert_array_equal(again.top1_prob, found.top1_prob)
