"""Blocks of `full_length`: hidden states, loss and gradients against decoder layers run by hand, dropped columns masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_llava
from layer_oracle import Frozen, fastv, row_of, run
from oracle import ProjectionPruner, Prompt, inputs_of, prompt, turned
from torch import Tensor

from codebook_prune import FastVPruner, PyramidPruner, UserError

KEEP, LAYER, DEEP = 7, 2, 3
IMAGE = tiny_llava().config.image_token_id
PROMPTS = [prompt(0, 0), prompt(1, 1), prompt(2, 2)]
FIRST = ProjectionPruner(keep_tokens=KEEP, positions="original")
PRUNERS: dict[str, Any] = {
    "original": FIRST,
    "compact": ProjectionPruner(keep_tokens=KEEP),
    "inside": FastVPruner(layer=LAYER, keep_tokens=DEEP),
    "both": FIRST | FastVPruner(layer=LAYER, keep_tokens=DEEP),
}


def padded(side: str) -> dict[str, Any]:
    """The prompts with labels: random ones for text, none for images, instructions and padding."""
    inputs = inputs_of(PROMPTS)
    if side == "right":
        inputs = turned(inputs)
    ids = inputs["input_ids"]
    random = torch.randint(5, 90, ids.shape, generator=torch.Generator().manual_seed(1))
    text = (ids != IMAGE) & inputs["attention_mask"].bool()
    inputs["labels"] = torch.where(text & (random % 4 > 0), random, -100)
    return inputs


def left_by_hand(model: Any, p: Prompt, name: str) -> list[list[int]]:
    """Columns of a row that are alive in every layer."""
    ids = inputs_of([p])["input_ids"][0].tolist()
    visual = [i for i, token in enumerate(ids) if token == IMAGE]
    gone: set[int] = set()
    if p.images and name != "inside":
        pixels = inputs_of([p])["pixel_values"]
        for number, features in enumerate(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output):
            ranked = sorted(range(16), key=lambda i, f=features: (f[i, ::2].mean().item(), i))
            gone |= {16 * number + i for i in ranked[KEEP:]}
    entering = [i for i in range(len(ids)) if i not in {visual[j] for j in gone}]
    layers = len(model.get_decoder().layers)
    if name in ("original", "compact"):
        return [entering] * layers
    row = row_of(model, p, gone, "original")
    alive = run(model, row, [fastv(LAYER, lambda _: DEEP)], Frozen())[1]
    return [[entering[i] for i in columns] for columns in alive]


def by_hand(model: Any, inputs: dict[str, Any], name: str) -> tuple[Tensor, Tensor]:
    """(loss, logits [batch, length, vocabulary]): all columns run through all layers, those dropped seen by none."""
    decoder, mask, ids = model.get_decoder(), inputs["attention_mask"].bool(), inputs["input_ids"]
    images = torch.cat(list(model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output))
    hidden = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE).unsqueeze(-1), images)
    alive = torch.zeros(len(decoder.layers), *ids.shape, dtype=torch.bool)
    for b, p in enumerate(PROMPTS):
        first = int(mask[b].byte().argmax())
        for layer, columns in enumerate(left_by_hand(model, p, name)):
            alive[layer, b, [first + i for i in columns]] = True
    numbers = (alive[0] if name == "compact" else mask).long().cumsum(1).sub(1).clamp(min=0)
    rotary = decoder.rotary_emb(hidden, position_ids=numbers)
    future = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    itself = torch.eye(ids.shape[1]).bool()
    for layer, seen in zip(decoder.layers, alive, strict=True):
        hide = (future | ~seen[:, None, None]) & ~itself  # what is dropped looks at itself, and nobody at it
        hidden = layer(hidden, attention_mask=~hide, position_embeddings=rotary)
    logits = model.lm_head(decoder.norm(hidden))
    losses = []
    for b, row in enumerate(inputs["labels"].tolist()):
        for i in range(1, len(row)):
            if row[i] != -100 and alive[-1, b, i - 1]:
                losses.append(-logits[b, i - 1].log_softmax(-1)[row[i]])
    return torch.stack(losses).mean(), logits * alive[-1].unsqueeze(-1)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", list(PRUNERS))
def test_loss_and_gradients_are_those_of_the_masked_model(name: str, side: str) -> None:
    model, inputs = tiny_llava(kv_heads=2), padded(side)
    expected, logits = by_hand(model, inputs, name)
    given = inputs["labels"].clone()
    with PRUNERS[name](model, full_length=True) as stats:
        out = model(**inputs)
    assert torch.equal(inputs["labels"], given)
    assert sum(stats.tokens_final) < sum(stats.tokens_before)
    assert abs(float((out.loss - expected).detach())) < 1e-5 * float(expected.detach())
    there = inputs["attention_mask"].bool()
    assert float((out.logits - logits)[there].detach().abs().max()) < 1e-5 * float(logits.detach().abs().max())
    assert not bool(out.logits[~there].any())
    mine, theirs = gradients(model, out.loss), gradients(model, expected)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert float((mine[key] - value).abs().max()) <= 2e-5 * float(value.abs().max()) + 1e-7, key


@pytest.mark.parametrize("pruner", [PRUNERS["both"], FIRST | PyramidPruner(layers=(1, 3)), PRUNERS["compact"]])
def test_gradient_checkpointing_changes_nothing(pruner: Any) -> None:
    model, inputs = tiny_llava(), padded("left")
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(layer, "gradient_checkpointing", False) for layer in model.get_decoder().layers)
        model.train()
        with pruner(model, full_length=True) as stats:
            loss = model(**inputs, use_cache=False).loss
        assert sum(stats.tokens_final) < sum(stats.tokens_before)
        found.append((loss, gradients(model, loss)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(value, found[1][1][key]) for key, value in found[0][1].items())


@torch.no_grad()
def test_keep_all_gives_the_loss_of_the_unpruned_model() -> None:
    model, inputs = tiny_llava(), padded("right")
    expected = model(**inputs)
    with (ProjectionPruner(keep_ratio=1.0) | FastVPruner(layer=2, keep_ratio=1.0))(model, full_length=True):
        out = model(**inputs)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.logits, expected.logits)


@torch.no_grad()
def test_generating_and_going_on_give_what_a_plain_block_gives() -> None:
    model, inputs = tiny_llava(), padded("left")
    del inputs["labels"]
    for pruner in (PRUNERS["both"], PRUNERS["compact"]):
        found = []
        for full_length in (False, True):
            with pruner(model, full_length=full_length):
                found.append(model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist())
                logits = model(**inputs).logits
        assert found[0] == found[1]
        assert logits.shape[1] == inputs["input_ids"].shape[1]


@torch.no_grad()
def test_without_it_labels_are_refused() -> None:
    model, inputs = tiny_llava(), padded("left")
    with FIRST(model), pytest.raises(UserError, match="prune with full_length=True"):
        model(**inputs)
