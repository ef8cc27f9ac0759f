"""The conformance matrix: every family through the same tests, against rows spliced by hand and run without hooks or cache."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import layer_oracle
import pytest
import torch
from families import FAMILIES, IMAGE, VIDEO, Family, Prompt
from oracle import ProjectionPruner, extend, greedy, plain_logits
from test_engine_rules import same, trace
from torch import Tensor

from codebook_prune import ContextPruner, FastVPruner, PyramidPruner, UniformPruner, UserError
from codebook_prune.adapters.grids import any_resolution, raster
from codebook_prune.adapters.loading import adapter_for, families

STEPS = 3
ALL = {(name, attention): make(attention) for name, make in FAMILIES.items() for attention in ("sdpa", "eager")}
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


@torch.no_grad()
def spliced(family: Family, p: Prompt) -> tuple[list[Tensor], list[list[int]]]:
    """A row's vectors with the encoder's features written over the placeholders, and the columns of each item."""
    base, ids, pixels = family.model.base_model, p.ids, family.row_pixels(p)
    vectors = list(family.model.get_input_embeddings()(torch.tensor(ids)))
    for placeholder, encode in ((IMAGE, "get_image_features"), (VIDEO, "get_video_features")):
        places = [i for i, token in enumerate(ids) if token == placeholder]
        if places:
            mine = {name: x for name, x in pixels.items() if ("videos" in name) == (placeholder == VIDEO)}
            out = getattr(base, encode)(**mine, return_dict=True).pooler_output
            features = [v for part in out for v in part.flatten(0, -2)]
            for place, feature in zip(places, features, strict=True):
                vectors[place] = feature
    columns, start = [], ids.index(p.items[0].ids[0], 1 + 2) if p.items else 0
    for one in p.items:
        columns.append([start + i for i, token in enumerate(one.ids) if token in (IMAGE, VIDEO)])
        start += len(one.ids) + 3
    return vectors, columns


def by_hand(family: Family, p: Prompt, budgets: list[int], positions: str) -> tuple[Tensor, Tensor, int]:
    """(embeddings, positions, next position) of a row of which each item keeps so many tokens, spread over its frames."""
    vectors, columns = spliced(family, p)
    gone: set[int] = set()
    for one, own, budget in zip(p.items, columns, budgets, strict=True):
        frames: dict[int, list[int]] = {}
        for column, (frame, row, _) in zip(own, one.cells, strict=True):
            if row >= 0:
                frames.setdefault(frame, []).append(column)
        total = sum(map(len, frames.values()))
        stays = min(budget, total)
        exact = {frame: Fraction(stays * len(members), total) for frame, members in frames.items()}
        share = {frame: int(x) for frame, x in exact.items()}
        for frame in sorted(frames, key=lambda f: (share[f] - exact[f], f))[: stays - sum(share.values())]:
            share[frame] += 1
        for frame, members in frames.items():
            ranked = sorted(members, key=lambda i: (vectors[i][::2].mean().item(), i))
            gone |= set(ranked[share[frame] :])
    left = [i for i in range(len(vectors)) if i not in gone]
    numbers = left if positions == "original" else list(range(len(left)))
    return torch.stack([vectors[i] for i in left])[None], torch.tensor([numbers]), numbers[-1] + 1


@each
@torch.no_grad()
def test_keep_all_is_the_unpruned_model_exactly(family: Family) -> None:
    inputs = family.inputs(family.prompts)
    expected, answer = family.model(**inputs).logits, generate(family.model, inputs)
    for pruner in (ProjectionPruner(keep_ratio=1.0), ProjectionPruner(threshold=1e9), FastVPruner(keep_ratio=1.0)):
        with pruner(family.model) as stats:
            assert torch.equal(family.model(**inputs).logits, expected)
            kept = generate(family.model, inputs)
        assert torch.equal(kept.sequences, answer.sequences)
        assert all(torch.equal(a, b) for a, b in zip(kept.logits, answer.logits, strict=True))
        assert stats.tokens_final == stats.tokens_before == [len(i.cells) for p in family.prompts for i in p.items] * 2


@each_once
@torch.no_grad()
def test_every_token_is_found_in_its_place(family: Family) -> None:
    """Frame, row and column as the family's own processing puts them; the same inside generate, and with beams."""
    inputs = family.inputs(family.prompts)
    expected = [list(one.cells) for p in family.prompts for one in p.items]
    twice = [list(one.cells) for p in family.prompts for _ in range(2) for one in p.items]
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
def test_every_step_equals_rows_spliced_by_hand(family: Family, positions: Any) -> None:
    """A ragged batch, prefill and decode, against single rows: uncached, no hooks; a budget of its own for every item."""
    prompts = family.prompts
    budgets = [[5 + 2 * number for number, _ in enumerate(p.items)] for p in prompts]
    inputs = family.inputs(prompts)
    pruner = ProjectionPruner(keep_tokens=tuple(k for row in budgets for k in row), positions=positions)
    with torch.no_grad():
        plain = family.model(**inputs).logits
    with pruner(family.model) as stats:
        out = generate(family.model, inputs)
        with torch.no_grad():
            logits = family.model(**inputs).logits
    separators = [sum(row < 0 for _, row, _ in one.cells) for p in prompts for one in p.items]
    sizes = [len(one.cells) for p in prompts for one in p.items]
    wanted = [min(k + s, n) for k, s, n in zip([k for row in budgets for k in row], separators, sizes, strict=True)]
    assert stats.tokens_after == wanted * 2
    for i, (p, budget) in enumerate(zip(prompts, budgets, strict=True)):
        row = by_hand(family, p, budget, positions)
        tokens, steps = greedy(family.model, row, STEPS)
        assert out.sequences[i, inputs["input_ids"].shape[1] :].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, steps, strict=True))
        reference = plain_logits(family.model, row[0], row[1])
        assert close(logits[i, -len(reference) :], reference)
        if p.items:  # pruning is visible at all
            assert not close(plain[i, -1], reference[-1])


@each_once
@torch.no_grad()
def test_a_second_turn_goes_on_with_the_pruned_cache(family: Family) -> None:
    p, more = family.prompts[1], [7, 8, 9]
    with ProjectionPruner(keep_tokens=4)(family.model):
        cache = family.model(**family.inputs([p])).past_key_values
        logits = family.model(input_ids=torch.tensor([more]), past_key_values=cache).logits
    row = extend(family.model, by_hand(family, p, [4], "compact"), more)
    assert close(logits[0], plain_logits(family.model, row[0], row[1])[-3:])


METHODS: dict[str, tuple[Any, list[layer_oracle.Rule]]] = {
    "fastv": (FastVPruner(layer=2, keep_ratio=0.25), [layer_oracle.fastv(2, lambda n: int(n / 4 + 0.5))]),
    "pyramid": (PyramidPruner(layers=(1, 3)), [layer_oracle.pyramid((1, 3), 0.5, "code", "code", True)]),
    "context": (ContextPruner(layers=2, p=0.3), [layer_oracle.context(2, 0.3, "last", 1)]),
}


@each_once
@pytest.mark.parametrize("method", METHODS)
def test_drops_between_layers_equal_the_decoder_by_hand(family: Family, method: str) -> None:
    pruner, rules = METHODS[method]
    inputs = family.inputs(family.prompts)
    with pruner(family.model) as stats:
        out = generate(family.model, inputs)
    masks = []
    for i, p in enumerate(family.prompts):
        vectors, columns = spliced(family, p)
        visual: list[bool | None] = [False] * len(vectors)
        for one, own in zip(p.items, columns, strict=True):
            for column, (_, row, _) in zip(own, one.cells, strict=True):
                visual[column] = True if row >= 0 else None
        row = layer_oracle.Row(vectors, visual, list(range(len(vectors))), [(0, len(vectors))])
        tokens, logits, kept = layer_oracle.greedy(family.model, row, rules, STEPS)
        assert out.sequences[i, inputs["input_ids"].shape[1] :].tolist() == tokens
        assert all(close(step[i], reference) for step, reference in zip(out.logits, logits, strict=True))
        masks += [[column in kept[-1] for column in own] for own in columns]
    assert [mask.tolist() for mask in stats.kept] == masks


@each_once
def test_leaving_the_block_restores_the_model(family: Family) -> None:
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
def test_an_item_that_does_not_enter_whole_is_refused(family: Family) -> None:
    inputs = family.inputs(family.prompts[1:2])
    with pytest.raises(UserError, match="does not enter whole") as caught, UniformPruner(keep_tokens=3)(family.model):
        generate(family.model, inputs, prefill_chunk_size=8)
    assert "\n" not in str(caught.value)


@each_once
@torch.no_grad()
def test_encoding_alone_gives_the_same_tokens(family: Family) -> None:
    p = next(p for p in family.prompts if p.items and VIDEO not in p.ids)
    visual = adapter_for(family.model).encode(family.inputs([p]))
    vectors, columns = spliced(family, p)
    assert torch.equal(visual.embeddings, torch.stack([vectors[i] for own in columns for i in own]))
    frame = torch.zeros(len(visual.image)).long() if visual.frame is None else visual.frame
    assert torch.cat([frame[:, None], visual.position], 1).tolist() == [list(c) for one in p.items for c in one.cells]


def test_the_matrix_holds_every_family() -> None:
    elsewhere = {"llava", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}  # test_engine.py, test_gemma3.py, test_mrope.py
    assert {family.model.config.model_type for family in SDPA} | elsewhere == set(families())
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in families())


def test_grids_are_shared_unchanged_and_outlive_inference_mode() -> None:
    with torch.inference_mode():
        first = raster(3, 5)
    any_resolution(torch.tensor([False] * 4 + ([False] * 4 + [True]) * 3), 2)
    assert raster(3, 5) is first
    assert not first.is_inference()
    assert torch.equal(first, torch.cartesian_prod(torch.arange(3), torch.arange(5)))
