"""Drops between decoder layers: caches that go on, beams, padding, nothing left behind, refusals."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import layer_oracle as by_hand
import numpy as np
import pytest
import torch
from conftest import noise_image, tiny_llava
from oracle import Prompt, inputs_of, prompt, turned
from test_engine_rules import same, trace
from test_layers import DEPTH, HALF, METHODS, MODELS, STEPS, close, each_method, each_model, generate
from torch import Tensor
from transformers import StaticCache

from codebook_prune import ContextPruner, FastVPruner, PyramidPruner, RateCurve, UniformPruner, UserError
from codebook_prune.layer_view import LayerView, highest
from codebook_prune.pruners.base import LayerPruner

MODEL = MODELS[2, "sdpa"]
ONE = inputs_of([prompt(1, 1)])
MORE = torch.randint(10, 60, (3, 3), generator=torch.Generator().manual_seed(3))


@each_model
@each_method
@pytest.mark.parametrize("masked", [True, False])
def test_a_second_turn_on_the_returned_cache(model: Any, method: str, masked: bool) -> None:
    pruner, rules = METHODS[method]
    prompts = [prompt(0, 0), prompt(1, 1), prompt(2, 2)] if masked else [prompt(1, 1)]
    inputs = inputs_of(prompts)
    with pruner(model):
        first = generate(model, inputs)
        ids = torch.cat([first.sequences, MORE[: len(prompts)]], 1)
        new = ids.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(prompts), new).long()], 1)
        again = {"input_ids": ids} | ({"attention_mask": mask} if masked else {})
        out = generate(model, again, past_key_values=first.past_key_values)
    for i, p in enumerate(prompts):
        row, frozen = by_hand.row_of(model, p), by_hand.Frozen()
        by_hand.run(model, row, rules, frozen)
        row = by_hand.said(model, row, ids[i, inputs["input_ids"].shape[1] :].tolist())
        tokens, logits, _ = by_hand.greedy(model, row, rules, STEPS, frozen)
        assert out.sequences[i, -STEPS:].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, logits, strict=True))


@each_model
@pytest.mark.parametrize("method", ["fastv", "pyramid", "pyramid-original", "context", "context-mean", "pyramid | context"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_second_turn_may_bring_another_image(model: Any, method: str, batch: int) -> None:
    pruner, rules = METHODS[method]
    turns = [(Prompt(prompt(s, 1).text + " yes </s>", prompt(s, 1).images), prompt(s + 2, s)) for s in (1, 2)][:batch]
    earlier = inputs_of([one for one, _ in turns])
    both = [Prompt(one.text + " " + two.text, one.images + two.images) for one, two in turns]
    mask = torch.zeros(batch, 0, dtype=torch.long)
    width, start = max(inputs_of([p])["input_ids"].shape[1] for p in both), earlier["input_ids"].shape[1]
    ids, later = torch.zeros(batch, width + 7, dtype=torch.long), []
    mask = torch.zeros_like(ids)
    ids[:, :start], mask[:, :start] = earlier["input_ids"], earlier["attention_mask"]
    for i, p in enumerate(both):
        tail = inputs_of([p])["input_ids"][0][int(earlier["attention_mask"][i].sum()) :]
        ids[i, -len(tail) :], mask[i, -len(tail) :] = tail, 1
        later.append(len(tail))
    keep = ~(mask[:, start:] == 0).all(0)
    ids, mask = (torch.cat([x[:, :start], x[:, start:][:, keep]], 1) for x in (ids, mask))
    again = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    again["pixel_values"] = torch.cat([inputs_of([two])["pixel_values"] for _, two in turns])
    with pruner(model), torch.no_grad():
        numbers = (earlier["attention_mask"].cumsum(1) - 1).clamp(min=0)
        cache = model(**earlier, position_ids=numbers).past_key_values
        out = generate(model, again, past_key_values=cache)
    for i, ((one, two), whole) in enumerate(zip(turns, both, strict=True)):
        row, frozen = by_hand.row_of(model, one), by_hand.Frozen()
        by_hand.run(model, row, rules, frozen)
        joint = by_hand.row_of(model, whole)
        vectors, visual = joint.vectors[-later[i] :], joint.visual[-later[i] :]
        assert sum(visual) == 16 * len(two.images)
        row = row.with_prompt(by_hand.Row(vectors, visual, list(range(later[i])), []))
        tokens, logits, _ = by_hand.greedy(model, row, rules, STEPS, frozen)
        assert out.sequences[i, -STEPS:].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, logits, strict=True))


@each_method
def test_beams_are_scored_as_by_hand(method: str) -> None:
    pruner, rules = METHODS[method]
    prompts, options = [prompt(1, 1), prompt(2, 2)], {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    inputs = inputs_of(prompts)
    with pruner(MODEL):
        out = generate(MODEL, inputs, output_scores=True, **options)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 4
    for i, p in enumerate(p for p in prompts for _ in range(2)):
        row, frozen, total = by_hand.row_of(MODEL, p), by_hand.Frozen(), 0.0
        for token in out.sequences[i, inputs["input_ids"].shape[1] :].tolist():
            logits, _ = by_hand.run(MODEL, row, rules, frozen)
            total += float(logits[-1].log_softmax(-1)[token])
            row = by_hand.said(MODEL, row, [token])
        assert float(out.sequences_scores[i]) == pytest.approx(total, abs=1e-3)


@each_method
def test_samples_are_drawn_from_what_is_by_hand(method: str) -> None:
    pruner, rules = METHODS[method]
    torch.manual_seed(3)
    with pruner(MODEL):
        out = generate(MODEL, ONE, do_sample=True, top_k=0)
    row, frozen = by_hand.row_of(MODEL, prompt(1, 1)), by_hand.Frozen()
    torch.manual_seed(3)
    for token in out.sequences[0, -STEPS:].tolist():
        logits, _ = by_hand.run(MODEL, row, rules, frozen)
        assert token == int(torch.multinomial(logits[-1].softmax(-1)[None], 1))
        row = by_hand.said(MODEL, row, [token])


@each_method
def test_prompt_lookup_gives_the_greedy_tokens(method: str) -> None:
    pruner, rules = METHODS[method]
    with pruner(MODEL):
        out = MODEL.generate(**ONE, prompt_lookup_num_tokens=3, do_sample=False, max_new_tokens=10)
    assert out[0, -10:].tolist() == by_hand.greedy(MODEL, by_hand.row_of(MODEL, prompt(1, 1)), rules, 10)[0]


@each_method
def test_drafts_behind_a_prompt_rank_nothing_and_stay(method: str) -> None:
    pruner, rules = METHODS[method]
    p = Prompt("USER: <image>\nis there a red circle and a red circle is there", (noise_image(4),))
    inputs = inputs_of([p])
    with pruner(MODEL) as stats:
        out = MODEL.generate(**inputs, prompt_lookup_num_tokens=3, do_sample=False, max_new_tokens=10)
    tokens, _, kept = by_hand.greedy(MODEL, by_hand.row_of(MODEL, p), rules, 10)
    assert out[0, -10:].tolist() == tokens
    assert stats.text_before == [inputs["input_ids"].shape[1] - 16]
    assert stats.text_final[0] + stats.tokens_final[0] == len(kept[-1])


@each_method
@torch.no_grad()
def test_forward_by_hand_on_a_copied_and_cropped_cache(method: str) -> None:
    pruner, rules = METHODS[method]
    row, frozen = by_hand.row_of(MODEL, prompt(1, 1)), by_hand.Frozen()
    by_hand.run(MODEL, row, rules, frozen)
    expected, _ = by_hand.run(MODEL, by_hand.said(MODEL, row, [11, 12, 13]), rules, frozen)
    with pruner(MODEL):
        cache = MODEL(**ONE).past_key_values
        for step in (11, 12):
            MODEL(input_ids=torch.tensor([[step]]), past_key_values=cache)
        cache = copy.deepcopy(cache)
    with pruner(MODEL):  # another block may go on with it
        assert close(MODEL(input_ids=torch.tensor([[13]]), past_key_values=cache).logits[0, -1], expected[-1])
        cache.crop(-2)
        assert close(MODEL(torch.tensor([[12, 13]]), past_key_values=cache).logits[0, -2:], expected[-2:])


@each_method
@each_model
@torch.no_grad()
def test_rows_may_be_padded_on_the_right(model: Any, method: str) -> None:
    pruner, rules = METHODS[method]
    prompts = [prompt(1, 1), prompt(2, 2)]
    inputs = inputs_of(prompts)
    with pruner(model):
        logits = model(**turned(inputs)).logits
    for i, p in enumerate(prompts):
        expected, _ = by_hand.run(model, by_hand.row_of(model, p), rules, by_hand.Frozen())
        assert close(logits[i, -len(expected) :], expected)


def test_equal_scores_keep_the_earlier_column() -> None:
    scores, candidates = torch.tensor([[1.0, 2.0, 2.0, 2.0, 9.0]] * 2), torch.tensor([[True] * 4 + [False]] * 2)
    assert highest(scores, candidates, torch.tensor([2, 0])).int().tolist() == [[0, 1, 1, 0, 0], [0] * 5]


@torch.no_grad()
def test_embeddings_outside_the_grid_stay() -> None:
    model = tiny_llava()
    model.config.vision_feature_select_strategy = "full"  # the [CLS] enters in front of the patches, without a place
    ids = ONE["input_ids"][0].tolist()
    ids.insert(ids.index(model.config.image_token_id), model.config.image_token_id)
    for pruner in (
        FastVPruner(keep_tokens=3),
        PyramidPruner(ratios=(3 / 16,)),
        ContextPruner(p=0.9) | FastVPruner(keep_tokens=3),
    ):
        with pruner(model) as stats:
            model(input_ids=torch.tensor([ids]), pixel_values=ONE["pixel_values"])
        assert (stats.tokens_before, stats.tokens_final) == ([17], [4])
        assert bool(stats.kept[0][0])


@torch.no_grad()
def test_the_last_token_of_a_prompt_stays_even_if_it_is_visual() -> None:
    ends = Prompt("USER: describe the image . <image>", (noise_image(1),))
    inputs = inputs_of([ends])
    for pruner in (FastVPruner(keep_tokens=1), PyramidPruner(ratios=(0.01,)), ContextPruner(p=0.9, layers=2)):
        with pruner(MODEL) as stats:
            logits = MODEL(**inputs).logits
        assert bool(stats.kept[0][-1])
        assert stats.tokens_final[0] in (1, 2, 16)
        assert logits.shape[1] == stats.tokens_final[0] + stats.text_final[0]


@dataclass(frozen=True, kw_only=True)
class Watcher(LayerPruner):
    """Drops every other visual token; remembers which keys it was told are real."""

    seen: list[Tensor] = field(default_factory=list)

    def plan(self, layers: int) -> Any:
        return {2: "previous", 4: "next"}

    def keep(self, view: LayerView) -> Tensor:
        self.seen.append(view.seen)
        return ~view.visual | (view.visual.cumsum(1) % 2 == 0)


def packed_to_the_right(inputs: dict[str, Tensor], gone: int) -> Tensor:
    """Mask of rows that lost `gone` tokens of every image."""
    images = (inputs["input_ids"] == MODEL.config.image_token_id).sum(1) // 16
    lengths = (inputs["attention_mask"].sum(1) - gone * images).tolist()
    return torch.tensor([[place >= max(lengths) - length for place in range(max(lengths))] for length in lengths])


@torch.no_grad()
def test_a_ranking_knows_which_keys_of_an_earlier_turn_are_real() -> None:
    first, later = inputs_of([prompt(1, 1), prompt(2, 2)]), inputs_of([prompt(4, 1), prompt(5, 2)])
    mask = torch.cat([first["attention_mask"], later["attention_mask"]], 1)
    watcher = Watcher()
    with watcher(MODEL):
        cache = MODEL(**first).past_key_values
        MODEL(**later | {"attention_mask": mask}, past_key_values=cache)
    previous, following = watcher.seen[2:]
    assert torch.equal(previous, mask.bool())  # layer 1 holds everything
    # in front of layer 4: a quarter of the first turn's visual tokens is left, half of the second's, each packed to the right
    expected = torch.cat([packed_to_the_right(turn, 16 - left) for turn, left in ((first, 4), (later, 8))], 1)
    assert torch.equal(following, expected)


class Broken(LayerPruner):
    """Fails in front of layer 2, after the layers before it ran."""

    def plan(self, layers: int) -> Any:
        return {1: "next", 2: "previous", 3: "next"}

    def keep(self, view: LayerView) -> Tensor:
        if view.layer == 2:
            raise RuntimeError("stop here")
        return ~view.visual


@torch.no_grad()
def test_leaving_the_block_restores_the_model() -> None:
    before, logits = trace(MODEL), MODEL(**ONE).logits
    configs = [layer.self_attn.config for layer in MODEL.get_decoder().layers]
    for pruner, _ in METHODS.values():
        with pruner(MODEL):
            MODEL.generate(**ONE, max_new_tokens=3)
            assert not same(before, trace(MODEL))
    with pytest.raises(RuntimeError, match="stop here"), Broken()(MODEL):
        MODEL(**ONE)
    assert same(before, trace(MODEL))
    assert all(layer.self_attn.config is config for layer, config in zip(MODEL.get_decoder().layers, configs, strict=True))
    assert torch.equal(MODEL(**ONE).logits, logits)


def test_fractions_of_numpy_are_fractions() -> None:
    half = np.float64(0.3)
    for pruner, plain in ((ContextPruner(p=half), ContextPruner(p=0.3)), (PyramidPruner(ratio=half), PyramidPruner(ratio=0.3))):
        with pruner(MODEL) as stats:
            out = generate(MODEL, ONE)
        with plain(MODEL) as expected:
            assert torch.equal(generate(MODEL, ONE).sequences, out.sequences)
        assert (stats.tokens_final, stats.text_final) == (expected.tokens_final, expected.text_final)


@torch.no_grad()
def test_a_failed_call_leaves_the_next_one_right() -> None:
    pruner, rules = METHODS["pyramid | context"]
    layer = MODEL.get_decoder().layers[3]
    with pruner(MODEL):
        handle = layer.mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("in the middle")))
        with pytest.raises(RuntimeError, match="in the middle"):
            MODEL(**ONE)
        handle.remove()
        out = generate(MODEL, ONE)
    tokens, *_ = by_hand.greedy(MODEL, by_hand.row_of(MODEL, prompt(1, 1)), rules, STEPS)
    assert out.sequences[0, -STEPS:].tolist() == tokens


def test_gradients_flow_through_what_is_kept() -> None:
    weight = MODEL.model.multi_modal_projector.linear_2.weight
    with PyramidPruner()(MODEL):
        MODEL(**ONE).logits[0, -1].sum().backward()
    assert float(weight.grad.abs().sum()) > 0
    MODEL.zero_grad()


@pytest.mark.parametrize(
    ("message", "build"),
    [
        ("no budget", FastVPruner),
        ("contradict", lambda: FastVPruner(keep_ratio=0.5, keep_tokens=3)),
        ("one number", lambda: FastVPruner(keep_tokens=(3, 4))),
        ("layer must be", lambda: FastVPruner(layer=0, keep_ratio=0.5)),
        ("positions must be", lambda: FastVPruner(keep_ratio=0.5, positions="gaps")),
        ("rank must be", lambda: PyramidPruner(rank="mine")),
        ("rounding must be", lambda: PyramidPruner(rounding="up")),
        ("contradict", lambda: PyramidPruner(ratio=0.5, ratios=(0.5,))),
        ("fractions kept", lambda: PyramidPruner(ratio=0.0)),
        ("fractions kept", lambda: PyramidPruner(ratios=())),
        ("must not rise", lambda: PyramidPruner(ratios=(0.5, 0.6))),
        ("rising numbers", lambda: PyramidPruner(layers=(4, 2))),
        ("one for each ratio", lambda: PyramidPruner(ratios=(0.5, 0.2), layers=(1, 2, 3))),
        ("layers must be", lambda: ContextPruner(layers=0)),
        ("protect_last must be", lambda: ContextPruner(protect_last=0)),
        ("start must be", lambda: ContextPruner(start=-1)),
        ("p is the fraction", lambda: ContextPruner(p=1.0)),
        ("p is the fraction", lambda: ContextPruner(p=True)),
        ("query must be", lambda: ContextPruner(query="first")),
        ("needs the question's span", lambda: ContextPruner(query="question")),
        ("a span is", lambda: ContextPruner(protect=(3, 4))),
        ("finite coefficients", lambda: RateCurve(0, 0, float("nan"))),
        ("finite coefficients", lambda: RateCurve(0, 0, 0, cap=1.0)),
        ("at least three lengths", lambda: RateCurve.fit({100: {0.1: 1, 0.2: 2, 0.3: 3}})),
        ("in front of those inside", lambda: PyramidPruner() | UniformPruner(keep_tokens=4)),
    ],
)
def test_bad_pruners_are_refused(message: str, build: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_models_with_too_few_layers_are_refused() -> None:
    for pruner, message in (
        (FastVPruner(layer=DEPTH, keep_ratio=0.5), "behind the last"),
        (PyramidPruner(layers=(2, 4, DEPTH)), "no room"),
        (ContextPruner(start=DEPTH - 1), "start is at most 4"),
        (PyramidPruner(ratios=(0.5,) * DEPTH), "no room"),
    ):
        before = trace(MODEL)
        with pytest.raises(UserError, match=message), pruner(MODEL):
            pass
        assert same(before, trace(MODEL))


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused() -> None:
    def step(cache: Any, rows: int = 1) -> Any:
        return MODEL(input_ids=torch.full((rows, 1), 5), past_key_values=cache)

    static = StaticCache(MODEL.config.get_text_config(), max_cache_len=64)
    outside = MODEL(**ONE).past_key_values
    with FastVPruner(keep_tokens=4)(MODEL):
        inside, cropped = (MODEL(**ONE).past_key_values for _ in range(2))
        cropped.crop(-1)
        for cache, rows, message in (
            (static, 1, "static cache"), (outside, 1, "not filled inside"), (cropped, 1, "cropped into"), (inside, 2, "1 rows"),
        ):  # fmt: skip
            with pytest.raises(UserError, match=message):
                step(cache, rows)
        with pytest.raises(UserError, match="already being pruned"), PyramidPruner()(MODEL):
            pass
    with UniformPruner(keep_tokens=4)(MODEL), pytest.raises(UserError, match="pruned inside the decoder"):
        step(inside)
    assert PyramidPruner().boundaries(DEPTH) == HALF
