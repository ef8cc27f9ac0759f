"""Pruning inside unmodified models against the slow reference of oracle.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import noise_image, tiny_llava
from oracle import ProjectionPruner, Prompt, extend, greedy, inputs_of, plain_logits, prompt, shortened, turned

KEEP, STEPS = 5, 4
BATCHES = {"single": [prompt(1, 1)], "ragged": [prompt(0, 0), prompt(1, 1), prompt(2, 2)]}
MODELS = {(kv, attention): tiny_llava(kv_heads=kv, attention=attention) for kv in (4, 2) for attention in ("sdpa", "eager")}

each_model = pytest.mark.parametrize("model", MODELS.values(), ids=["-".join(map(str, key)) for key in MODELS])
each_batch = pytest.mark.parametrize("prompts", BATCHES.values(), ids=list(BATCHES))
each_policy = pytest.mark.parametrize("positions", ["compact", "original"])


def generate(model: Any, inputs: dict[str, Any], steps: int = STEPS, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": steps, "min_new_tokens": steps, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Within 1e-5 of the largest logit. Absolute differences reach 1.4e-5 on logits of 3 to 5, and 1.0e-5 without any pruning:
    float32 sums in another order. One position off by one moves them by 0.5 and more."""
    return float((left - right).abs().max()) < 1e-5 * float(right.abs().max())


@each_model
@each_batch
@each_policy
@torch.no_grad()
def test_keep_all_is_the_unpruned_model_exactly(model: Any, prompts: list[Prompt], positions: Any) -> None:
    inputs = inputs_of(prompts)
    expected, answer = model(**inputs).logits, generate(model, inputs)
    for budget in ({"keep_tokens": 16}, {"keep_ratio": 1.0}, {"threshold": 1e9}):
        with ProjectionPruner(**budget, positions=positions)(model) as stats:
            assert torch.equal(model(**inputs).logits, expected)
            pruned = generate(model, inputs)
        assert torch.equal(pruned.sequences, answer.sequences)
        assert all(torch.equal(a, b) for a, b in zip(pruned.logits, answer.logits, strict=True))
        assert stats.tokens_before == stats.tokens_after == [16] * 2 * sum(len(p.images) for p in prompts)


@each_model
@each_batch
@each_policy
@torch.no_grad()
def test_prefill_equals_the_reference(model: Any, prompts: list[Prompt], positions: Any) -> None:
    inputs = inputs_of(prompts)
    numbered = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    for extra in ({}, numbered, {"use_cache": False}, numbered | {"use_cache": False}):
        with ProjectionPruner(keep_tokens=KEEP, positions=positions)(model):
            logits = model(**inputs, **extra).logits
        rows = [shortened(model, p, KEEP, positions) for p in prompts]
        assert logits.shape[1] == max(row[0].shape[1] for row in rows)
        for got, row in zip(logits, rows, strict=True):
            assert close(got[-row[0].shape[1] :], plain_logits(model, row[0], row[1]))


@each_model
@each_batch
@each_policy
@pytest.mark.parametrize("cache", [True, False])
def test_every_decode_step_equals_the_reference(model: Any, prompts: list[Prompt], positions: Any, cache: bool) -> None:
    inputs = inputs_of(prompts)
    plain = generate(model, inputs)
    with ProjectionPruner(keep_tokens=KEEP, positions=positions)(model):
        out = generate(model, inputs, use_cache=cache)
    for i, p in enumerate(prompts):
        tokens, logits = greedy(model, shortened(model, p, KEEP, positions), STEPS)
        assert out.sequences[i, inputs["input_ids"].shape[1] :].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, logits, strict=True))
        if p.images:  # pruning is visible at all
            assert not close(plain.logits[0][i], logits[0])


@each_model
@each_policy
@torch.no_grad()
def test_rows_may_be_padded_on_the_right(model: Any, positions: Any) -> None:
    prompts = BATCHES["ragged"]
    with ProjectionPruner(keep_tokens=KEEP, positions=positions)(model):
        logits = model(**turned(inputs_of(prompts))).logits
    for got, p in zip(logits, prompts, strict=True):
        embeds, numbers, _ = shortened(model, p, KEEP, positions)
        assert close(got[-embeds.shape[1] :], plain_logits(model, embeds, numbers))


@each_model
@each_policy
def test_a_batch_without_mask_drops_to_ragged_rows(model: Any, positions: Any) -> None:
    prompts = [prompt(1, 1), prompt(4, 1)]
    inputs = inputs_of(prompts)
    assert bool(inputs["attention_mask"].all())
    del inputs["attention_mask"]
    with ProjectionPruner(keep_tokens=(3, 9), positions=positions)(model) as stats:
        out = generate(model, inputs)
    assert stats.tokens_after == [3, 9]
    for i, (p, keep) in enumerate(zip(prompts, (3, 9), strict=True)):
        tokens, logits = greedy(model, shortened(model, p, keep, positions), STEPS)
        assert out.sequences[i, inputs["input_ids"].shape[1] :].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, logits, strict=True))


@each_policy
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 2}])
def test_beams_and_samples_equal_those_over_shortened_embeddings(positions: Any, options: dict[str, Any]) -> None:
    model = MODELS[2, "sdpa"]
    p = prompt(2, 2)
    embeds, numbers, _ = shortened(model, p, KEEP, positions)
    torch.manual_seed(7)
    expected = model.generate(
        inputs_embeds=embeds, position_ids=numbers, attention_mask=torch.ones_like(numbers), max_new_tokens=8,
        **{"do_sample": False, **options},
    )  # fmt: skip
    torch.manual_seed(7)
    with ProjectionPruner(keep_tokens=KEEP, positions=positions)(model):
        out = model.generate(**inputs_of([p]), max_new_tokens=8, **{"do_sample": False, **options})
    assert torch.equal(out[:, inputs_of([p])["input_ids"].shape[1] :], expected)


def test_budgets_of_each_image_follow_their_images_into_beams() -> None:
    model, prompts = MODELS[4, "sdpa"], [prompt(2, 2), prompt(1, 1)]
    with ProjectionPruner(keep_tokens=(2, 11, 6))(model) as stats:
        together = model.generate(**inputs_of(prompts), num_beams=3, do_sample=False, max_new_tokens=5)
    assert stats.tokens_after == [2, 11] * 3 + [6] * 3
    for i, (p, keep) in enumerate(zip(prompts, ((2, 11), (6,)), strict=True)):
        with ProjectionPruner(keep_tokens=keep)(model):
            alone = model.generate(**inputs_of([p]), num_beams=3, do_sample=False, max_new_tokens=5)
        assert together[i, -5:].tolist() == alone[0, -5:].tolist()


def test_prompt_lookup_gives_the_greedy_tokens() -> None:
    model, p = MODELS[4, "sdpa"], prompt(1, 1)
    for positions in ("compact", "original"):
        with ProjectionPruner(keep_tokens=KEEP, positions=positions)(model):
            out = model.generate(**inputs_of([p]), prompt_lookup_num_tokens=3, do_sample=False, max_new_tokens=12)
        tokens, _ = greedy(model, shortened(model, p, KEEP, positions), 12)
        assert out[0, inputs_of([p])["input_ids"].shape[1] :].tolist() == tokens


@pytest.mark.parametrize("ending", ["red", "circle is there a red circle"])
def test_drafts_behind_a_prompt_are_cut_off_the_cache_again(ending: str) -> None:
    """The prompt's last words stand earlier in it, so that its first pass holds a draft; it is refused, mostly."""
    model, p = MODELS[4, "sdpa"], Prompt(f"USER: <image>\nis there a red circle and a red {ending}", (noise_image(4),))
    inputs, drafts = inputs_of([p]), list[int]()
    with ProjectionPruner(keep_tokens=KEEP)(model):
        note = lambda _, __, kwargs: drafts.append(kwargs["logits_to_keep"])  # noqa: E731
        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        out = model.generate(**inputs, prompt_lookup_num_tokens=3, do_sample=False, max_new_tokens=12)
        handle.remove()
    assert drafts[0] > 1
    tokens, _ = greedy(model, shortened(model, p, KEEP, "compact"), 12)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == tokens


def second_turn(model: Any, inputs: dict[str, Any], first: Any, more: torch.Tensor, full: bool, masked: bool) -> dict[str, Any]:
    """Arguments of a second generate on the first one's cache, in each form transformers accepts."""
    said = torch.cat([first.sequences, more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(said), said.shape[1] - inputs["input_ids"].shape[1]).long()], 1)
    ids = said if full else said[:, first.past_key_values.true_length :]
    return {"input_ids": ids, "past_key_values": first.past_key_values} | ({"attention_mask": mask} if masked else {})


@each_model
@each_batch
@each_policy
@pytest.mark.parametrize(("full", "masked"), [(True, True), (False, True), (True, False)])
def test_a_second_turn_on_the_returned_cache(
    model: Any, prompts: list[Prompt], positions: Any, full: bool, masked: bool
) -> None:
    if len(prompts) > 1 and not masked:
        prompts = prompts[1:2] * 2  # without padding the mask may be left out
    inputs, more = inputs_of(prompts), torch.randint(10, 60, (len(prompts), 3), generator=torch.Generator().manual_seed(3))
    with ProjectionPruner(keep_tokens=KEEP, positions=positions)(model) as stats:
        first = generate(model, inputs)
        first.past_key_values.true_length = first.sequences.shape[1] - 1
        images = len(stats.tokens_after)
        out = generate(model, second_turn(model, inputs, first, more, full, masked))
        assert len(stats.tokens_after) == images
    for i, p in enumerate(prompts):
        row = shortened(model, p, KEEP, positions)
        said = first.sequences[i, inputs["input_ids"].shape[1] :].tolist() + more[i].tolist()
        tokens, logits = greedy(model, extend(model, row, said), STEPS)
        assert out.sequences[i, -STEPS:].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, logits, strict=True))


@each_policy
@pytest.mark.parametrize("batch", [1, 2])
def test_a_second_turn_may_bring_another_image(positions: Any, batch: int) -> None:
    model = MODELS[2, "sdpa"]
    turns = [(Prompt(p.text + " yes </s>", p.images), prompt(3 + i, i + 1)) for i, p in enumerate([prompt(1, 1), prompt(4, 1)])]
    turns = turns[:batch]
    both = [Prompt(one.text + " " + two.text, one.images + two.images) for one, two in turns]
    inputs, earlier = inputs_of(both), inputs_of([one for one, _ in turns])
    length = earlier["input_ids"].shape[1]
    width = inputs["input_ids"].shape[1]
    # pad inside the second turn, as a batch of conversations on one cache has it
    ids = torch.zeros(batch, width, dtype=torch.long)
    mask = torch.zeros(batch, width, dtype=torch.long)
    for i in range(batch):
        whole = inputs["input_ids"][i][inputs["attention_mask"][i].bool()]
        ids[i, :length], mask[i, :length] = whole[:length], 1
        ids[i, width - len(whole) + length :], mask[i, width - len(whole) + length :] = whole[length:], 1
    assert torch.equal(ids[:, :length], earlier["input_ids"])
    pixels = torch.cat([inputs_of([two])["pixel_values"] for _, two in turns])
    with ProjectionPruner(keep_tokens=KEEP, positions=positions)(model), torch.no_grad():
        cache = model(**earlier).past_key_values
        numbers = (mask.cumsum(1) - 1).clamp(min=0)
        again = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "position_ids": numbers}
        out = generate(model, again, past_key_values=cache)
    for i, p in enumerate(both):
        tokens, logits = greedy(model, shortened(model, p, KEEP, positions), STEPS)
        assert out.sequences[i, -STEPS:].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, logits, strict=True))


@each_policy
@torch.no_grad()
def test_forward_by_hand_on_the_cache(positions: Any) -> None:
    model, p = MODELS[4, "eager"], prompt(1, 1)
    row = extend(model, shortened(model, p, KEEP, positions), [11, 12, 13])
    reference = plain_logits(model, row[0], row[1])[-1]
    with ProjectionPruner(keep_tokens=KEEP, positions=positions)(model):
        cache = model(**inputs_of([p])).past_key_values
        for step in (11, 12):
            model(input_ids=torch.tensor([[step]]), past_key_values=cache)
        assert close(model(input_ids=torch.tensor([[13]]), past_key_values=cache).logits[0, -1], reference)
        cache.crop(-2)
        assert close(model(torch.tensor([[12, 13]]), past_key_values=cache).logits[0, -1], reference)
