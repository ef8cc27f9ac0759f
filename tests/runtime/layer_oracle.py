"""The slow reference for drops between layers: Llama written out for one row, no hooks, no cache, no batch, no masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import Prompt, inputs_of
from torch import Tensor


@dataclass
class Row:
    """One prompt and the tokens generated behind it: vectors, which of them are visual, positions, length of the prompt."""

    vectors: list[Tensor]
    visual: list[bool]
    numbers: list[int]
    prompt: int

    def with_token(self, vector: Tensor) -> Row:
        return Row([*self.vectors, vector], [*self.visual, False], [*self.numbers, self.numbers[-1] + 1], self.prompt)


@dataclass
class Moment:
    """What a rule may look at in front of a layer: its columns, those no earlier rule dropped there, attention between them."""

    columns: list[int]
    alive: list[int]
    visual: list[bool]
    prompt: int
    entered: int
    previous: list[list[list[float]]]  # [head][query][key], of the layer that just ran
    following: list[list[list[float]]]  # the same, of the layer that would run now


@dataclass
class Rule:
    """A pruning method: at these layers, these columns go; whether the gaps close."""

    layers: tuple[int, ...]
    gone: Callable[[int, Moment], set[int]]
    compact: bool


@dataclass
class Frozen:
    """What each rule dropped at the prompt: (rule, layer) -> columns."""

    choices: dict[tuple[int, int], set[int]] = field(default_factory=dict)


def row_of(model: Any, p: Prompt, gone: set[int] | None = None, positions: str = "compact") -> Row:
    """The row's input vectors, image features written in; `gone` are visual tokens (counted from 0) that never enter."""
    inputs = inputs_of([p])
    vectors = list(model.get_input_embeddings()(inputs["input_ids"][0]))
    visual = [token == model.config.image_token_id for token in inputs["input_ids"][0].tolist()]
    places = [i for i, is_visual in enumerate(visual) if is_visual]
    if places:
        images = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
        for place, feature in zip(places, torch.cat(list(images)), strict=True):
            vectors[place] = feature
    out = {places[i] for i in gone or ()}
    left = [i for i in range(len(vectors)) if i not in out]
    numbers = left if positions == "original" else list(range(len(left)))
    return Row([vectors[i] for i in left], [visual[i] for i in left], numbers, len(left))


def norm(x: Tensor, module: Any) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight


def rotate(x: Tensor, numbers: list[int], theta: float) -> Tensor:
    """Rotary embedding of [length, d] at these positions."""
    half = x.shape[-1] // 2
    angle = torch.tensor(numbers).float()[:, None] / theta ** (torch.arange(half).float() / half)
    one, two = x[:, :half], x[:, half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


def attend(layer: Any, hidden: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """(attention output [length, d], probabilities [heads, length, length]) of one layer."""
    attention = layer.self_attn
    d, theta = attention.head_dim, attention.config.rope_parameters["rope_theta"]
    x = norm(hidden, layer.input_layernorm)
    q, k, v = (getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
    heads, each = q.shape[1] // d, q.shape[1] // k.shape[1]
    future = torch.ones(len(x), len(x)).triu(1).bool()
    rows, outputs = [], []
    for head in range(heads):
        own, shared = slice(head * d, head * d + d), slice(head // each * d, head // each * d + d)
        logits = rotate(q[:, own], numbers, theta) @ rotate(k[:, shared], numbers, theta).T / math.sqrt(d)
        rows.append(logits.masked_fill(future, -math.inf).softmax(-1))
        outputs.append(rows[-1] @ v[:, shared])
    return attention.o_proj(torch.cat(outputs, -1)), torch.stack(rows)


@torch.no_grad()
def run(model: Any, row: Row, rules: list[Rule], frozen: Frozen) -> tuple[Tensor, list[list[int]]]:
    """(logits of the columns that reach the end, columns alive in each layer); choices are made once and kept in `frozen`."""
    alive = list(range(len(row.vectors)))
    numbers = dict(enumerate(row.numbers))
    hidden, probabilities, depths = torch.stack(row.vectors), torch.zeros(0), []
    decoder = model.get_decoder()
    for depth, layer in enumerate(decoder.layers):
        given = list(alive)
        gone_here: set[int] = set()
        for number, rule in enumerate(rules):
            if depth not in rule.layers:
                continue
            if (number, depth) not in frozen.choices:
                following = attend(layer, hidden, [numbers[i] for i in given])[1]
                left = [i for i in given if i not in gone_here]
                rows = probabilities.tolist(), following.tolist()
                moment = Moment(given, left, row.visual, row.prompt, sum(row.visual), *rows)
                frozen.choices[number, depth] = rule.gone(depth, moment)
            gone_here |= frozen.choices[number, depth]
        for number, rule in enumerate(rules):
            if depth in rule.layers and rule.compact:
                gone = frozen.choices[number, depth]
                numbers = {i: numbers[i] - sum(j < i for j in gone) for i in numbers}
        alive = [i for i in given if i not in gone_here]
        hidden = hidden[[given.index(i) for i in alive]]
        output, probabilities = attend(layer, hidden, [numbers[i] for i in alive])
        hidden = hidden + output
        x = norm(hidden, layer.post_attention_layernorm)
        hidden = hidden + layer.mlp.down_proj(torch.nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
        depths.append(alive)
    return model.lm_head(norm(hidden, decoder.norm)), depths


@torch.no_grad()
def greedy(model: Any, row: Row, rules: list[Rule], steps: int) -> tuple[list[int], list[Tensor], list[list[int]]]:
    """Greedy tokens, the logits of each, and the columns alive in each layer at the prompt."""
    frozen, tokens, logits, kept = Frozen(), [], [], []
    for _ in range(steps):
        every, depths = run(model, row, rules, frozen)
        kept = kept or depths
        logits.append(every[-1])
        tokens.append(int(logits[-1].argmax()))
        vector = model.get_input_embeddings()(torch.tensor(tokens[-1]))
        row = row.with_token(vector)
    return tokens, logits, kept


def ranked(moment: Moment, rows: list[list[list[float]]], candidates: list[int], pool: str) -> list[int]:
    """Candidates from the most to the least attended by the last prompt token; mean or max over heads; the earlier first."""
    columns = moment.columns
    last = columns.index(moment.prompt - 1)
    score = {}
    for i in candidates:
        values = [head[last][columns.index(i)] for head in rows]
        score[i] = max(values) if pool == "max" else sum(values) / len(values)
    return sorted(candidates, key=lambda i: (-score[i], i))


def seen_by_all(moment: Moment, candidates: list[int]) -> list[int]:
    """Candidates from the most to the least attended by all who see them, the largest over heads each time."""
    columns = moment.columns
    score = {}
    for i in candidates:
        column = columns.index(i)
        queries = range(column, len(columns))
        score[i] = sum(max(head[q][column] for head in moment.previous) for q in queries) / len(queries)
    return sorted(candidates, key=lambda i: (-score[i], i))


def fastv(layer: int, keep: Callable[[int], int]) -> Rule:
    def gone(depth: int, moment: Moment) -> set[int]:
        images = [i for i in moment.alive if moment.visual[i]]
        return set(ranked(moment, moment.previous, images, "mean")[keep(len(images)) :])

    return Rule((layer,), gone, compact=False)


def pyramid(layers: tuple[int, ...], ratio: float, rank: str, rounding: str, compact: bool) -> Rule:
    def gone(depth: int, moment: Moment) -> set[int]:
        images = [i for i in moment.alive if moment.visual[i]]
        if rounding == "code":
            keep = int(moment.entered * ratio ** (layers.index(depth) + 1))
        else:
            keep = len(images) - math.ceil((1 - ratio) * len(images))
        rows = moment.following if rank == "code" else moment.previous
        return set(ranked(moment, rows, images, "mean")[max(keep, 1) :])

    return Rule(layers, gone, compact)


def context(layers: int, p: float, query: str, protect: int) -> Rule:
    def gone(depth: int, moment: Moment) -> set[int]:
        prompt = [i for i in moment.alive if i < moment.prompt]
        text = [i for i in prompt if not moment.visual[i]]
        free = [i for i in text if i != prompt[0] and i not in prompt[-protect:]]
        order = ranked(moment, moment.previous, free, "max") if query == "last" else seen_by_all(moment, free)
        return set(order[max(0, len(free) - math.floor(p * len(text))) :])

    return Rule(tuple(range(1, layers + 1)), gone, compact=False)
