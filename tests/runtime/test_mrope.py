"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL beyond the matrix of test_families.py: what M-RoPE makes special."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_oracle import plain_greedy, plain_logits, said
from mrope import END, FAMILIES, PROMPTS, START, image, inputs_of, lay, row_of, tiny
from oracle import ProjectionPruner
from torch import Tensor

from codebook_prune import UserError
from codebook_prune.adapters.qwen_vl import read_grid

KEEP, STEPS = 4, 3
each_family = pytest.mark.parametrize("family", FAMILIES)


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def close(left: Tensor, right: Tensor) -> bool:
    """Within 2e-5 of the largest logit."""
    return float((left - right).detach().abs().max()) < 2e-5 * float(right.detach().abs().max())


@each_family
def test_without_a_cache_every_step_prunes_anew(family: str) -> None:
    model, p = tiny(family), PROMPTS["mixed"]
    with ProjectionPruner(keep_tokens=KEEP)(model) as stats:
        out = generate(model, inputs_of(family, [p]), use_cache=False)
    tokens, steps = plain_greedy(model, row_of(model, p, KEEP), STEPS)
    assert out.sequences[0, -STEPS:].tolist() == tokens
    assert all(close(step[0], reference) for step, reference in zip(out.logits, steps, strict=True))
    assert stats.calls == STEPS


@each_family
def test_every_item_has_its_own_budget_also_among_beams(family: str) -> None:
    model, prompts = tiny(family), [PROMPTS["two"], PROMPTS["mixed"]]
    with ProjectionPruner(keep_tokens=(1, 7, 5, 2))(model) as stats:
        out = generate(model, inputs_of(family, prompts))
        assert stats.tokens_after == [1, 7, 5, 2]
        assert [grid.max().item() + 1 for grid in stats.frame] == [1, 1, 2, 1]
        beams = model.generate(**inputs_of(family, prompts), num_beams=2, do_sample=False, max_new_tokens=STEPS)
    for i, (p, keep) in enumerate(zip(prompts, ((1, 7), (5, 2)), strict=True)):
        assert out.sequences[i, -STEPS:].tolist() == plain_greedy(model, row_of(model, p, keep), STEPS)[0]
        with ProjectionPruner(keep_tokens=keep)(model):
            alone = model.generate(
                **inputs_of(family, [p]), num_beams=2, do_sample=False, max_new_tokens=STEPS, use_cache=False
            )
        assert beams[i, -STEPS:].tolist() == alone[0, -STEPS:].tolist()


@each_family
@pytest.mark.parametrize("form", ["all", "with types and grids", "new ids only"])
def test_a_second_turn_on_the_returned_cache(family: str, form: str) -> None:
    model, prompts = tiny(family), [PROMPTS["one"], PROMPTS["mixed"]]
    inputs, more = inputs_of(family, prompts), torch.tensor([[40, 41, 42], [43, 44, 45]])
    with ProjectionPruner(keep_tokens=KEEP)(model) as stats:
        first = generate(model, inputs)
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, STEPS + 3).long()], 1)
        again = {"input_ids": ids if form != "new ids only" else ids[:, -4:], "attention_mask": mask}
        if form == "with types and grids":
            again["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros(2, STEPS + 3).int()], 1)
            again |= {name: grid for name, grid in inputs.items() if name.endswith("thw")}
        out = generate(model, again, past_key_values=first.past_key_values)
        assert stats.calls == 1
    for i, p in enumerate(prompts):
        row = said(model, row_of(model, p, KEEP), first.sequences[i, -STEPS:].tolist() + more[i].tolist())
        tokens, steps = plain_greedy(model, row, STEPS)
        assert out.sequences[i, -STEPS:].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, steps, strict=True))


@each_family
def test_a_second_turn_may_bring_another_image(family: str) -> None:
    model = tiny(family)
    first, both = PROMPTS["one"], [*PROMPTS["one"], [40, START], image(9, 4, 12), [END, 41]]
    laid, second = lay(family, both), inputs_of(family, [[[40, START], image(9, 4, 12), [END, 41]]])
    numbers = torch.tensor([[*range(len(laid.ids))], *zip(*laid.places, strict=True)])[:, None]
    with ProjectionPruner(keep_tokens=KEEP)(model) as stats, torch.no_grad():
        cache = model(**inputs_of(family, [first])).past_key_values
        again = {"input_ids": torch.tensor([laid.ids]), "attention_mask": torch.ones(1, len(laid.ids)).long()}
        again |= {name: second[name] for name in ("pixel_values", "image_grid_thw")}
        out = generate(model, again | {"position_ids": numbers}, past_key_values=cache)
    assert stats.tokens_before == [24, 12]
    tokens, steps = plain_greedy(model, row_of(model, both, KEEP), STEPS)
    assert out.sequences[0, -STEPS:].tolist() == tokens
    assert all(close(step[0], reference) for step, reference in zip(out.logits, steps, strict=True))


@each_family
@torch.no_grad()
def test_forward_by_hand_on_the_cache(family: str) -> None:
    """The model numbers what follows by itself, from its `rope_deltas` and a cache that is shorter than it thinks."""
    model, prompts = tiny(family), [PROMPTS["one"], PROMPTS["two"]]
    inputs = inputs_of(family, prompts)
    for masked in (False, True):
        if not masked:  # without padding the mask may be left out
            prompts, inputs = prompts[:1], inputs_of(family, prompts[:1])
        ones = torch.ones(len(prompts), 3).long()
        with ProjectionPruner(keep_tokens=KEEP)(model):
            cache = model(**inputs).past_key_values
            for number, token in enumerate((40, 41, 42)):
                mask = {"attention_mask": torch.cat([inputs["attention_mask"], ones[:, : number + 1]], 1)} if masked else {}
                logits = model(input_ids=ones[:, :1] * token, past_key_values=cache, **mask).logits
        for i, p in enumerate(prompts):
            row = said(model, row_of(model, p, KEEP), [40, 41, 42])
            assert close(logits[i, -1], plain_logits(model, row)[-1])


@each_family
def test_loss_of_full_length(family: str) -> None:
    model, p = tiny(family), PROMPTS["mixed"]
    inputs = inputs_of(family, [p])
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] > 0, -100)
    with ProjectionPruner(keep_tokens=KEEP)(model, full_length=True):
        out = model(**inputs, labels=labels)
    row = row_of(model, p, KEEP)
    columns = [lay(family, p).places.index(place) for place in row.numbers]
    expected = plain_logits(model, row)
    assert close(out.logits[0, columns], expected)
    losses = [
        -expected[columns.index(i - 1)].log_softmax(-1)[label]
        for i, label in enumerate(labels[0].tolist())
        if i and label != -100 and i - 1 in columns
    ]
    assert close(out.loss, torch.stack(losses).mean())
    out.loss.backward()
    gradient = model.model.visual.merger.get_parameter("mlp.2.weight" if family != "qwen3_vl" else "linear_fc2.weight").grad
    assert float(gradient.abs().sum()) > 0
    model.zero_grad()


@each_family
@pytest.mark.parametrize("size", [9, 11])
def test_a_prefill_in_chunks_is_refused(family: str, size: int) -> None:
    """Also where the cut falls between two rows of the grid, so that what enters is a grid."""
    with ProjectionPruner(keep_tokens=KEEP)(tiny(family)), pytest.raises(UserError, match="prefill_chunk_size"):
        generate(tiny(family), inputs_of(family, [PROMPTS["one"]]), prefill_chunk_size=size)


@each_family
@pytest.mark.parametrize("name", ["one", "video"])
def test_positions_without_places_are_refused(family: str, name: str) -> None:
    inputs = inputs_of(family, [PROMPTS[name]])
    del inputs["mm_token_type_ids"]  # generate then numbers visual tokens like text
    with ProjectionPruner(keep_tokens=KEEP)(tiny(family)), pytest.raises(UserError, match="pass mm_token_type_ids"):
        generate(tiny(family), inputs)


def test_grids_are_read_off_positions() -> None:
    one = torch.cartesian_prod(torch.arange(3), torch.arange(2)).T
    assert read_grid(*one) == (1, 3, 2)
    assert read_grid(*torch.cat([one, one + 5], 1)) == (2, 3, 2)
    assert read_grid(*torch.zeros(2, 1).long()) == (1, 1, 1)
    for broken in (one[:, :5], one[:, [0, 1, 3, 2]], torch.cat([one, one[:, [1, 0, 2, 3, 4, 5]]], 1), torch.zeros(2, 3).long()):
        with pytest.raises(UserError, match="do not place its visual tokens on a grid"):
            read_grid(*broken)
