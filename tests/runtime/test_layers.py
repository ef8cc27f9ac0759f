"""Drops between decoder layers against the model written out by hand (layer_oracle.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

import layer_oracle as by_hand
import pytest
import torch
from conftest import tiny_llava
from oracle import ProjectionPruner, Prompt, inputs_of, prompt

from codebook_prune import ContextPruner, FastVPruner, PyramidPruner, RateCurve

STEPS, DEPTH = 4, 6
BATCHES = {"single": [prompt(1, 1)], "ragged": [prompt(0, 0), prompt(1, 1), prompt(2, 2)]}
MODELS = {
    (kv, attention): tiny_llava(kv_heads=kv, attention=attention, layers=DEPTH)
    for kv in (4, 2)
    for attention in ("sdpa", "eager")
}
HALF = (1, 3, 4)
METHODS: dict[str, tuple[Any, list[by_hand.Rule]]] = {
    "fastv": (FastVPruner(layer=2, keep_tokens=5), [by_hand.fastv(2, lambda n: min(n, 5))]),
    "fastv-ratio": (FastVPruner(layer=3, keep_ratio=0.25), [by_hand.fastv(3, lambda n: n // 4)]),
    "fastv-threshold": (FastVPruner(layer=2, threshold=0.8), [by_hand.fastv_threshold(2, 0.8)]),
    "fastv-one-left": (FastVPruner(layer=2, threshold=-1), [by_hand.fastv_threshold(2, -1)]),
    "pyramid": (PyramidPruner(), [by_hand.pyramid(HALF, 0.5, "code", "code", True)]),
    "pyramid-paper": (
        PyramidPruner(ratio=0.6, rank="paper", rounding="paper", layers=(2, 4)),
        [by_hand.pyramid((2, 4), 0.6, "paper", "paper", True)],
    ),
    "pyramid-original": (
        PyramidPruner(ratio=0.6, positions="original"),
        [by_hand.pyramid(HALF, 0.6, "code", "code", False)],
    ),
    "context": (ContextPruner(layers=3, p=0.3), [by_hand.context(3, 0.3, "last", 1)]),
    "context-deeper": (
        ContextPruner(layers=2, start=2, p=0.3),
        [dataclasses.replace(by_hand.context(4, 0.3, "last", 1), layers=(3, 4))],
    ),
    "context-mean": (ContextPruner(layers=9, p=0.2, query="mean", protect_last=3), [by_hand.context(5, 0.2, "mean", 3)]),
    "context-question": (
        ContextPruner(layers=4, p=0.25, query="question", question=(-5, -1), positions="compact"),
        [dataclasses.replace(by_hand.context(4, 0.25, "question", 1, (slice(-5, -1),)), compact=True)],
    ),
    "context-dynamic": (
        ContextPruner(layers=3, p=RateCurve(1e-3, 0.0, 0.15), protect=((2, 4), (-3, None)), protect_markers=True),
        [by_hand.context(3, lambda n: 1e-3 * n * n + 0.15, "last", 1, (slice(2, 4), slice(-3, None)), markers=True)],
    ),
    "pyramid | context": (
        PyramidPruner() | ContextPruner(layers=3),
        [by_hand.pyramid(HALF, 0.5, "code", "code", True), by_hand.context(3, 0.3, "last", 1)],
    ),
    "fastv | pyramid": (  # at one layer, ranked by two kinds of attention: what the first drops the second cannot keep
        FastVPruner(layer=2, keep_tokens=7) | PyramidPruner(layers=(2,), ratio=0.25),
        [by_hand.fastv(2, lambda n: min(n, 7)), by_hand.pyramid((2,), 0.25, "code", "code", True)],
    ),
    "pyramid | fastv": (
        PyramidPruner(layers=(2,), ratio=0.25) | FastVPruner(layer=2, keep_tokens=2),
        [by_hand.pyramid((2,), 0.25, "code", "code", True), by_hand.fastv(2, lambda n: min(n, 2))],
    ),
    "context | fastv": (
        ContextPruner(layers=3) | FastVPruner(layer=2, keep_ratio=0.5),
        [by_hand.context(3, 0.3, "last", 1), by_hand.fastv(2, lambda n: n // 2)],
    ),
}

each_model = pytest.mark.parametrize("model", MODELS.values(), ids=["-".join(map(str, key)) for key in MODELS])
each_batch = pytest.mark.parametrize("prompts", BATCHES.values(), ids=list(BATCHES))
each_method = pytest.mark.parametrize("method", METHODS)


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Within 1e-5 of the largest logit, as in test_engine.py."""
    return float((left - right).abs().max()) < 1e-5 * float(right.abs().max())


def check_row(model: Any, out: Any, i: int, width: int, row: by_hand.Row, rules: list[by_hand.Rule]) -> list[list[int]]:
    """Tokens and logits of every step of a row equal those by hand; the columns kept in each layer."""
    tokens, logits, kept = by_hand.greedy(model, row, rules, STEPS)
    assert out.sequences[i, width:].tolist() == tokens
    assert all(close(step[i], reference) for step, reference in zip(out.logits, logits, strict=True))
    return kept


def place(row: by_hand.Row, column: int) -> int:
    """Which image of its row a visual column belongs to."""
    return sum(bool(visual) for visual in row.visual[:column]) // 16


@each_model
@each_batch
@each_method
def test_every_step_equals_the_model_by_hand(model: Any, prompts: list[Prompt], method: str) -> None:
    pruner, rules = METHODS[method]
    inputs = inputs_of(prompts)
    plain = generate(model, inputs)
    with pruner(model) as stats:
        out = generate(model, inputs)
    rows = [by_hand.row_of(model, p) for p in prompts]
    kept = [check_row(model, out, i, inputs["input_ids"].shape[1], row, rules) for i, row in enumerate(rows)]
    lengths = [max(len(row[layer]) for row in kept) + STEPS - 1 for layer in range(DEPTH)]
    assert [out.past_key_values.get_seq_length(layer) for layer in range(DEPTH)] == lengths
    masks = [[i in row[-1] for i in range(len(r.visual)) if r.visual[i]] for r, row in zip(rows, kept, strict=True)]
    assert torch.cat([torch.tensor([], dtype=torch.bool), *stats.kept]).tolist() == [keep for row in masks for keep in row]
    visual = [[sum(r.visual[i] for i in layer) for layer in row] for r, row in zip(rows, kept, strict=True)]
    assert sum(stats.tokens_final) == sum(row[-1] for row in visual)
    assert stats.tokens_after == stats.tokens_before
    images = [[[i for i in layer if r.visual[i]] for layer in row] for r, row in zip(rows, kept, strict=True)]
    assert stats.tokens_per_layer == [
        [sum(place(r, i) == image for i in layer) for layer in row]
        for r, row, p in zip(rows, images, prompts, strict=True)
        for image in range(len(p.images))
    ]
    assert stats.layer_averaged_tokens * len(stats.kept) == pytest.approx(sum(map(sum, visual)) / DEPTH)
    assert stats.text_before == [len(r.visual) - sum(r.visual) for r in rows]
    assert stats.text_final == [len(row[-1]) - v[-1] for row, v in zip(kept, visual, strict=True)]
    for i, row in enumerate(kept):  # pruning is visible at all
        assert len(row[-1]) == len(row[0]) or not close(plain.logits[0][i], out.logits[0][i])


def test_the_order_of_a_chain_matters() -> None:
    inputs = inputs_of([prompt(2, 2)])
    fastv, pyramid = FastVPruner(layer=2, keep_tokens=9), PyramidPruner(layers=(2,), ratio=0.25)
    kept = []
    for chain in (fastv | pyramid, pyramid | fastv):
        with chain(MODELS[4, "sdpa"]) as stats:
            generate(MODELS[4, "sdpa"], inputs)
        kept.append(torch.cat(stats.kept))
    assert [int(one.sum()) for one in kept] == [8, 8]
    assert not torch.equal(*kept)


@each_model
@each_batch
@torch.no_grad()
def test_prefill_equals_the_model_by_hand(model: Any, prompts: list[Prompt]) -> None:
    inputs = inputs_of(prompts)
    for method, (pruner, rules) in METHODS.items():
        for extra in ({}, {"use_cache": False}, {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}):
            with pruner(model):
                logits = model(**inputs, **extra).logits
            for i, p in enumerate(prompts):
                expected, kept = by_hand.run(model, by_hand.row_of(model, p), rules, by_hand.Frozen())
                if len(prompts) == 1:
                    assert logits.shape[1] == len(kept[-1]), method
                assert close(logits[i, -len(expected) :], expected), method


@each_model
@each_batch
@torch.no_grad()
def test_keep_all_is_the_unpruned_model_exactly(model: Any, prompts: list[Prompt]) -> None:
    inputs = inputs_of(prompts)
    expected, answer = model(**inputs).logits, generate(model, inputs)
    everything = (
        FastVPruner(keep_ratio=1.0), PyramidPruner(ratio=1.0), PyramidPruner(ratio=1.0, rank="paper"), ContextPruner(p=0.0),
        ProjectionPruner(keep_tokens=16) | PyramidPruner(ratio=1.0) | ContextPruner(p=0),
    )  # fmt: skip
    for pruner in everything:
        with pruner(model) as stats:
            assert torch.equal(model(**inputs).logits, expected)
            kept = generate(model, inputs)
        assert torch.equal(kept.sequences, answer.sequences)
        assert all(torch.equal(a, b) for a, b in zip(kept.logits, answer.logits, strict=True))
        assert stats.tokens_final == stats.tokens_before == [16] * 2 * sum(len(p.images) for p in prompts)
        assert all(bool(mask.all()) for mask in stats.kept)


@each_model
@each_batch
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_chain_drops_before_layer_0_first(model: Any, prompts: list[Prompt], positions: Any) -> None:
    keep = 9
    chain = ProjectionPruner(keep_tokens=keep, positions=positions) | PyramidPruner() | ContextPruner(layers=2)
    rules = [by_hand.pyramid(HALF, 0.5, "code", "code", True), by_hand.context(2, 0.3, "last", 1)]
    inputs = inputs_of(prompts)
    with chain(model) as stats:
        out = generate(model, inputs)
    assert set(stats.tokens_after) == {keep}
    for i, p in enumerate(prompts):
        whole, gone = by_hand.row_of(model, p), set[int]()
        features = [v[::2].mean().item() for v, visual in zip(whole.vectors, whole.visual, strict=True) if visual]
        for image in range(len(p.images)):
            order = sorted(range(16 * image, 16 * image + 16), key=lambda t: (features[t], t))
            gone |= set(order[keep:])
        row = by_hand.row_of(model, p, gone, positions)
        check_row(model, out, i, inputs["input_ids"].shape[1], row, rules)
