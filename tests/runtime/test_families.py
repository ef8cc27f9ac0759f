"""The conformance matrix: every family through the same tests, against rows spliced by hand and run without hooks or cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import layer_oracle
import pytest
import torch
from families import FAMILIES, VIDEO, llava
from layer_oracle import plain_greedy, plain_logits, said
from mrope import QWEN
from oracle import ProjectionPruner
from test_engine_rules import same, trace
from torch import Tensor

from codebook_prune import ContextPruner, FastVPruner, PyramidPruner, UniformPruner, UserError
from codebook_prune.adapters.grids import any_resolution, raster
from codebook_prune.adapters.loading import adapter_for, families
from codebook_prune.visual_tokens import EnteringTokens

STEPS = 3
MATRIX: dict[str, Any] = {"llava": llava, **FAMILIES, **QWEN}
ALL = {(name, attention): make(attention) for name, make in MATRIX.items() for attention in ("sdpa", "eager")}
SDPA = [family for (_, attention), family in ALL.items() if attention == "sdpa"]

each = pytest.mark.parametrize("family", ALL.values(), ids=["-".join(key) for key in ALL])
each_once = pytest.mark.parametrize("family", SDPA, ids=[family.name for family in SDPA])
each_policy = pytest.mark.parametrize("positions", ["compact", "original"])


def close(left: Tensor, right: Tensor) -> bool:
    """Within 2e-5 of the largest logit."""
    return float((left - right).abs().max()) <= 2e-5 * float(right.abs().max())


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


@each
@torch.no_grad()
def test_keep_all_is_the_unpruned_model_exactly(family: Any) -> None:
    inputs = family.inputs(family.prompts)
    expected, answer = family.model(**inputs).logits, generate(family.model, inputs)
    for pruner in (ProjectionPruner(keep_ratio=1.0), ProjectionPruner(threshold=1e9), FastVPruner(keep_ratio=1.0)):
        with pruner(family.model) as stats:
            assert torch.equal(family.model(**inputs).logits, expected)
            kept = generate(family.model, inputs)
        assert torch.equal(kept.sequences, answer.sequences)
        assert all(torch.equal(a, b) for a, b in zip(kept.logits, answer.logits, strict=True))
        assert (
            stats.tokens_final == stats.tokens_before == [len(cells) for p in family.prompts for cells in family.cells(p)] * 2
        )


@each_once
@torch.no_grad()
def test_every_token_is_found_in_its_place(family: Any) -> None:
    """Frame, row and column as the family's own processing puts them; the same inside generate, and with beams."""
    inputs = family.inputs(family.prompts)
    expected = [cells for p in family.prompts for cells in family.cells(p)]
    twice = [cells for p in family.prompts for _ in range(2) for cells in family.cells(p)]
    pruner = UniformPruner(keep_ratio=0.5)
    calls = (
        (expected, lambda: family.model(**inputs)),
        (expected, lambda: family.model.generate(**inputs, max_new_tokens=1)),
        (twice, lambda: family.model.generate(**inputs, max_new_tokens=1, num_beams=2, do_sample=False)),
    )
    for cells, call in calls:
        with pruner(family.model) as stats:
            call()
        found = [torch.cat([f[:, None], p], 1) for f, p in zip(stats.frame, stats.position, strict=True)]
        assert [[tuple(cell) for cell in one.tolist()] for one in found] == [
            [(frame, row, column) for frame, row, column in one] for one in cells
        ]
        for one, kept in zip(cells, stats.kept, strict=True):  # half of every frame, and every separator
            for frame in {f for f, _, _ in one}:
                mine = [k for k, (f, row, _) in zip(kept.tolist(), one, strict=True) if f == frame and row >= 0]
                assert abs(sum(mine) - len(mine) / 2) < 1
            assert all(k for k, (_, row, _) in zip(kept.tolist(), one, strict=True) if row < 0)


@each
@each_policy
def test_every_step_equals_rows_spliced_by_hand(family: Any, positions: Any) -> None:
    """A ragged batch, prefill and decode, against single rows: uncached, no hooks; a budget of its own for every item."""
    prompts, model = family.prompts, family.model
    budgets = [[5 + 2 * number for number, _ in enumerate(family.cells(p))] for p in prompts]
    inputs = family.inputs(prompts)
    pruner = ProjectionPruner(keep_tokens=tuple(k for row in budgets for k in row), positions=positions)
    with torch.no_grad():
        plain = model(**inputs).logits
    with pruner(model) as stats:
        out = generate(model, inputs)
        with torch.no_grad():
            logits = model(**inputs).logits
    items = [cells for p in prompts for cells in family.cells(p)]
    wanted = [
        min(k + sum(row < 0 for _, row, _ in cells), len(cells))
        for k, cells in zip([k for row in budgets for k in row], items, strict=True)
    ]
    assert stats.tokens_after == wanted * 2
    for i, (p, budget) in enumerate(zip(prompts, budgets, strict=True)):
        whole, row = family.row(p), family.row(p, budget, positions)
        assert close(plain[i, -len(whole.vectors) :], plain_logits(model, whole))  # the hand puts tokens where the model does
        tokens, steps = plain_greedy(model, row, STEPS)
        assert out.sequences[i, inputs["input_ids"].shape[1] :].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, steps, strict=True))
        reference = plain_logits(model, row)
        assert close(logits[i, -len(reference) :], reference)
        if budget:  # pruning is visible at all
            assert not close(plain[i, -1], reference[-1])


@each_once
@torch.no_grad()
def test_a_second_turn_goes_on_with_the_pruned_cache(family: Any) -> None:
    p, more = family.prompts[1], [7, 8, 9]
    with ProjectionPruner(keep_tokens=4)(family.model):
        cache = family.model(**family.inputs([p])).past_key_values
        logits = family.model(input_ids=torch.tensor([more]), past_key_values=cache).logits
    row = said(family.model, family.row(p, [4]), more)
    assert close(logits[0], plain_logits(family.model, row)[-3:])


FIRST = 6
METHODS: dict[str, tuple[Any, Any]] = {  # the pruner, its rule given whether compact positions close gaps in this family
    "fastv": (FastVPruner(layer=2, keep_ratio=0.25), lambda _: layer_oracle.fastv(2, lambda n: int(n / 4 + 0.5))),
    "pyramid": (PyramidPruner(layers=(2, 3)), lambda gaps: layer_oracle.pyramid((2, 3), 0.5, "code", "code", gaps)),
    "pyramid-paper": (
        PyramidPruner(layers=(2, 3), rank="paper", rounding="paper", positions="original"),
        lambda _: layer_oracle.pyramid((2, 3), 0.5, "paper", "paper", False),
    ),
    "context": (ContextPruner(layers=2, p=0.3), lambda _: layer_oracle.context(2, 0.3, "last", 1)),
    "context-deeper": (  # behind Qwen3-VL's DeepStack layers
        ContextPruner(layers=1, start=2, p=0.3),
        lambda _: dataclasses.replace(layer_oracle.context(1, 0.3, "last", 1), layers=(3,)),
    ),
}


@each_once
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_drops_between_layers_equal_the_decoder_by_hand(family: Any, method: str, before: bool) -> None:
    """Alone, and behind a pruner in front of layer 0."""
    (pruner, rule), adapter = METHODS[method], adapter_for(family.model)
    if min(pruner.plan(9)) < adapter.whole_layers:
        with pytest.raises(UserError, match="need every visual token") as caught:
            pruner(family.model).__enter__()
        assert "\n" not in str(caught.value)
        return
    inputs = family.inputs(family.prompts)
    with (ProjectionPruner(keep_tokens=FIRST) | pruner if before else pruner)(family.model) as stats:
        out = generate(family.model, inputs)
    masks = []
    for i, p in enumerate(family.prompts):
        columns = family.columns(p)
        row = family.row(p, [FIRST] * len(columns) if before else None)
        tokens, logits, kept = layer_oracle.greedy(family.model, row, [rule(adapter.numbers_in_line)], STEPS)
        assert out.sequences[i, inputs["input_ids"].shape[1] :].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, logits, strict=True))
        if before:
            masks.append(sum(row.visual[column] is not False for column in kept[-1]))
        else:
            masks += [[column in kept[-1] for column in own] for own in columns]
    if before:
        assert sum(stats.tokens_final) == sum(masks)
    else:
        assert [mask.tolist() for mask in stats.kept] == masks


@each_once
def test_leaving_the_block_restores_the_model(family: Any) -> None:
    inputs = family.inputs(family.prompts)
    with torch.no_grad():
        expected = family.model(**inputs).logits
    before = trace(family.model)

    def stop(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        raise RuntimeError("stop here")

    chain = ProjectionPruner(keep_tokens=5) | FastVPruner(layer=2, keep_ratio=0.5)
    with chain(family.model):
        generate(family.model, inputs)
        assert not same(before, trace(family.model))
    assert same(before, trace(family.model))
    with pytest.raises(RuntimeError, match="stop here"), chain(family.model):
        generate(family.model, inputs, stopping_criteria=[stop])
    assert same(before, trace(family.model))
    with torch.no_grad():
        assert torch.equal(family.model(**inputs).logits, expected)


@each_once
def test_an_item_that_does_not_enter_whole_is_refused(family: Any) -> None:
    inputs = family.inputs(family.prompts[1:2])
    with pytest.raises(UserError, match="prefill_chunk_size") as caught, UniformPruner(keep_tokens=3)(family.model):
        generate(family.model, inputs, prefill_chunk_size=8)
    assert "\n" not in str(caught.value)


@each_once
@torch.no_grad()
def test_encoding_alone_gives_the_same_tokens(family: Any) -> None:
    shown = [p for p in family.prompts if family.cells(p) and "pixel_values_videos" not in family.inputs([p])]
    p = shown[0]
    visual = adapter_for(family.model).encode(family.inputs([p]))
    vectors = family.row(p).vectors
    assert torch.equal(visual.embeddings, torch.stack([vectors[i] for own in family.columns(p) for i in own]))
    frame = torch.zeros(len(visual.image)).long() if visual.frame is None else visual.frame
    assert torch.cat([frame[:, None], visual.position], 1).tolist() == [list(c) for cells in family.cells(p) for c in cells]


def test_tokens_left_over_are_refused() -> None:
    adapter = adapter_for(ALL["llava_onevision", "sdpa"].model)
    ids = torch.full((1, 27), VIDEO)  # of two videos of equally many tokens
    entering = EnteringTokens(torch.arange(27), torch.zeros(27, 64), ids, {"pixel_values_videos": torch.zeros(2)})
    with pytest.raises(UserError, match="does not enter whole"):
        adapter.layout(entering)


def test_the_matrix_holds_every_family() -> None:
    assert {family.model.config.model_type for family in SDPA} | {"gemma3"} == set(families())  # that is in test_gemma3.py
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert all(f"`{name}`" in page for name in families())


def test_grids_are_shared_unchanged_and_outlive_inference_mode() -> None:
    with torch.inference_mode():
        first = raster(3, 5)
    any_resolution(torch.tensor([False] * 4 + ([False] * 4 + [True]) * 3), 2)
    assert raster(3, 5) is first
    assert not first.is_inference()
    assert torch.equal(first, torch.cartesian_prod(torch.arange(3), torch.arange(5)))
