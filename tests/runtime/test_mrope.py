"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: pruned against rows by hand with explicit three-dimensional positions."""

from __future__ import annotations

from typing import Any

import layer_oracle
import pytest
import torch
from layer_oracle import Rule, said
from mrope import BATCHES, DEEP, END, FAMILIES, PROMPTS, START, greedy, image, inputs_of, lay, plain_logits, row_of, tiny
from oracle import ProjectionPruner
from test_engine_rules import same, trace
from torch import Tensor

from codebook_prune import ContextPruner, FastVPruner, PyramidPruner, UserError
from codebook_prune.adapters.qwen_vl import read_grid

KEEP, STEPS = 4, 3
each_family = pytest.mark.parametrize("family", FAMILIES)
each_batch = pytest.mark.parametrize("batch", BATCHES)
each_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def close(left: Tensor, right: Tensor) -> bool:
    """Within 2e-5 of the largest logit."""
    return float((left - right).detach().abs().max()) < 2e-5 * float(right.detach().abs().max())


@each_family
@each_attention
@torch.no_grad()
def test_keep_all_is_the_unpruned_model_exactly(family: str, attention: str) -> None:
    model = tiny(family, attention)
    for names in (["mixed"], BATCHES["ragged"]):
        inputs = inputs_of(family, [PROMPTS[name] for name in names])
        expected, answer = model(**inputs).logits, generate(model, inputs)
        for pruner in (ProjectionPruner(keep_ratio=1.0), FastVPruner(layer=DEEP, keep_ratio=1.0)):
            with pruner(model) as stats:
                assert torch.equal(model(**inputs).logits, expected)
                out = generate(model, inputs)
            assert torch.equal(out.sequences, answer.sequences)
            assert all(torch.equal(a, b) for a, b in zip(out.logits, answer.logits, strict=True))
            assert stats.tokens_before == stats.tokens_final


@each_family
@each_attention
@each_batch
@torch.no_grad()
def test_prefill_and_every_step_equal_rows_by_hand(family: str, attention: str, batch: str) -> None:
    model, prompts = tiny(family, attention), [PROMPTS[name] for name in BATCHES[batch]]
    inputs = inputs_of(family, prompts)
    plain = model(**inputs).logits
    with ProjectionPruner(keep_tokens=KEEP, positions="original")(model) as stats:
        logits = model(**inputs).logits
        out = generate(model, inputs)
    with ProjectionPruner(keep_tokens=KEEP, positions="compact")(model):
        assert torch.equal(model(**inputs).logits, logits)  # every token keeps its place
    assert set(stats.tokens_after) == {KEEP}
    for i, p in enumerate(prompts):
        whole, row = row_of(model, p), row_of(model, p, KEEP)
        assert close(plain[i, -len(whole.vectors) :], plain_logits(model, whole))  # the reference places tokens as the model
        assert close(logits[i, -len(row.vectors) :], plain_logits(model, row))
        tokens, steps = greedy(model, row, STEPS)
        assert out.sequences[i, inputs["input_ids"].shape[1] :].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, steps, strict=True))


@each_family
def test_without_a_cache_every_step_prunes_anew(family: str) -> None:
    model, p = tiny(family), PROMPTS["mixed"]
    with ProjectionPruner(keep_tokens=KEEP)(model) as stats:
        out = generate(model, inputs_of(family, [p]), use_cache=False)
    tokens, steps = greedy(model, row_of(model, p, KEEP), STEPS)
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
        assert out.sequences[i, -STEPS:].tolist() == greedy(model, row_of(model, p, keep), STEPS)[0]
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
        tokens, steps = greedy(model, row, STEPS)
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
    tokens, steps = greedy(model, row_of(model, both, KEEP), STEPS)
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


METHODS: dict[str, tuple[Any, Rule]] = {
    "fastv": (FastVPruner(layer=2, keep_tokens=5), layer_oracle.fastv(2, lambda n: min(n, 5))),
    "pyramid": (PyramidPruner(layers=(2, 4), ratio=0.6), layer_oracle.pyramid((2, 4), 0.6, "code", "code", False)),
    "pyramid-paper": (
        PyramidPruner(layers=(3, 5), rank="paper", rounding="paper", positions="original"),
        layer_oracle.pyramid((3, 5), 0.5, "paper", "paper", False),
    ),
    "context": (ContextPruner(layers=3), layer_oracle.context(3, 0.3, "last", 1)),
}


@each_family
@pytest.mark.parametrize(("method", "before"), zip(METHODS, (False, True, False, True), strict=True))
def test_drops_between_layers_equal_the_decoder_by_hand(family: str, method: str, before: bool) -> None:
    model, prompts = tiny(family), [PROMPTS["one"], PROMPTS["mixed"]]
    pruner, rule = METHODS[method]
    if family == "qwen3_vl" and method == "context":
        with pytest.raises(UserError, match="the first 2 decoder layers of qwen3_vl need every visual token") as caught:
            pruner(model).__enter__()
        assert "\n" not in str(caught.value)
        return
    inputs = inputs_of(family, prompts)
    chain = ProjectionPruner(keep_tokens=8) | pruner if before else pruner
    with chain(model) as stats:
        out = generate(model, inputs)
    kept = []
    for i, p in enumerate(prompts):
        row = row_of(model, p, 8 if before else 10**6)
        tokens, steps, depths = layer_oracle.greedy(model, row, [rule], STEPS)
        assert out.sequences[i, -STEPS:].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, steps, strict=True))
        kept.append(sum(row.visual[column] for column in depths[-1]))
    assert sum(stats.tokens_final) == sum(kept)


@torch.no_grad()
def test_restored_after_exit() -> None:
    for family in FAMILIES:
        model, inputs = tiny(family), inputs_of(family, [PROMPTS["mixed"]])
        before, logits = trace(model), model(**inputs).logits
        with (ProjectionPruner(keep_tokens=3) | FastVPruner(layer=2, keep_tokens=2))(model):
            generate(model, inputs)
        assert same(before, trace(model))
        assert torch.equal(model(**inputs).logits, logits)


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
    with ProjectionPruner(keep_tokens=KEEP)(tiny(family)), pytest.raises(UserError, match="does not enter whole"):
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
