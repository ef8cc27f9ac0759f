"""Probing the Qwen families: one plain forward per experiment, every position given in time, height and width."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise_image
from layer_oracle import Row, plain_logits
from mrope import END, FAMILIES, START, Prompt, image, inputs_of, lay, row_of, tiny
from test_probe import Answers, Array, assert_scores, config

from codebook_builder.probe import Prober

PROMPT: Prompt = [[5, 6, START], image(1, 8, 6), [END, 7, 8, 9]]
GRID = (4, 3)


@dataclass
class HandMade:
    """A processor that answers with one prompt, whatever the image (Qwen's own needs a video backend)."""

    family: str
    chat_template: str = "one"
    tokenizer: Any = field(default_factory=lambda: SimpleNamespace(pad_token_id=0, eos_token_id=2))

    def apply_chat_template(self, chat: Any, **_: Any) -> dict[str, Any]:
        return inputs_of(self.family, [PROMPT])


def oracle(family: str, ablation: str) -> Answers:
    """Every experiment as an image of its own: the cells shown from a corner of their own, text behind their larger side."""
    model, whole, laid = tiny(family), row_of(tiny(family), PROMPT), lay(family, PROMPT)
    places = [i for i, item in enumerate(laid.item) if item == 0]
    head, tail = whole.vectors[: places[0]], whole.vectors[places[-1] + 1 :]
    pad = model.get_input_embeddings().weight[0]
    rows, columns = GRID
    index = {(r, c): places[r * columns + c] for r in range(rows) for c in range(columns)}

    @torch.no_grad()
    def run(top: int, left: int, height: int, width: int, gone: list[tuple[int, int]]) -> Array:
        vectors, numbers = list(head), [(i,) * 3 for i in range(len(head))]
        deep: tuple[dict[int, Any], ...] = tuple({} for _ in whole.deep)
        start = len(head)
        for r in range(height):
            for c in range(width):
                cell = (top + r, left + c)
                if cell in gone and ablation == "drop":
                    continue
                for mine, every in zip(deep, whole.deep, strict=True):
                    if cell not in gone:
                        mine[len(vectors)] = every[index[cell]]
                vectors.append(pad if cell in gone else whole.vectors[index[cell]])
                numbers.append((start, start + r, start + c))
        behind = start + max(height, width)
        numbers += [(behind + i,) * 3 for i in range(len(tail))]
        row = Row([*vectors, *tail], [], numbers, [], deep)
        return plain_logits(model, row)[-1].double().numpy()

    answers: dict[str, list[Array]] = {"single": [], "region": [], "region_ablated": [], "whole_ablated": []}
    for row, column in index:
        top, left = max(0, min(rows - 3, row - 1)), max(0, min(columns - 3, column - 1))
        window = [(r, c) for r in range(top, top + 3) for c in range(left, left + 3)]
        answers["single"].append(run(row, column, 1, 1, []))
        answers["region"].append(run(top, left, 3, 3, []))
        answers["region_ablated"].append(run(top, left, 3, 3, [(row, column)]))
        answers["whole_ablated"].append(run(0, 0, rows, columns, window))
    return Answers(
        whole=run(0, 0, rows, columns, []),
        embeddings=torch.stack([whole.vectors[i] for i in places]).double().numpy(),
        cls_similarity=None,
        **{name: np.stack(logits) for name, logits in answers.items()},
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ablation", ["replace", "drop"])
def test_scores_equal_one_forward_per_experiment(family: str, ablation: str) -> None:
    model = tiny(family)
    model.get_input_embeddings().weight.data[0].normal_(generator=torch.Generator().manual_seed(5))
    answers = oracle(family, ablation)
    prober = Prober(model, HandMade(family), config(ablation=ablation), None)
    for found in prober.probe([noise_image(0)] * 3, ["a", "b", "c"]):
        assert found.position.tolist() == [[r, c] for r in range(GRID[0]) for c in range(GRID[1])]
        assert_scores(found, answers, "jsd")
    plain = model(**inputs_of(family, [PROMPT])).logits[0, -1]  # the whole image is run as the model runs it
    np.testing.assert_allclose(answers.whole, plain.detach().double().numpy(), atol=1e-4)
