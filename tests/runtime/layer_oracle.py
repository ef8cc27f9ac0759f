"""The slow reference for drops between layers: the decoder written out for one row, no hooks, no cache, no batch, no masks.

Llama, and Qwen's with their biases, norms, M-RoPE and DeepStack. A position is a number, or three with M-RoPE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import Prompt, inputs_of
from torch import Tensor

Number = int | tuple[int, int, int]
Attention = tuple[list[int], list[list[list[float]]]]  # columns, [head][query][key]


@dataclass
class Row:
    """Prompts and the tokens generated behind them: vectors, which of them are visual (None: a newline between visual rows,
    never dropped), positions, [start, end) of prompts; deep: what DeepStack adds to columns behind each of the first layers."""

    vectors: list[Tensor]
    visual: list[bool | None]
    numbers: list[Any]
    prompts: list[tuple[int, int]]
    deep: tuple[dict[int, Tensor], ...] = ()

    def with_token(self, vector: Tensor) -> Row:
        numbers = [*self.numbers, later(self.numbers[-1], 1)]
        return Row([*self.vectors, vector], [*self.visual, False], numbers, self.prompts, self.deep)

    def with_prompt(self, more: Row) -> Row:
        """A further turn, with drops of its own."""
        start, number = len(self.vectors), self.numbers[-1] + 1
        numbers = [*self.numbers, *(later(i, number) for i in more.numbers)]
        prompts = [*self.prompts, (start, start + len(more.vectors))]
        return Row([*self.vectors, *more.vectors], [*self.visual, *more.visual], numbers, prompts)


@dataclass
class Moment:
    """What a rule may look at in front of a layer: columns of the latest prompt that no earlier rule dropped there, the last
    column of the prompt and how many visual tokens entered in it; attention, columns of which it speaks first."""

    alive: list[int]
    visual: list[bool | None]
    last: int
    entered: int
    previous: Attention  # of the layer that just ran
    following: Attention  # of the layer that would run now


@dataclass
class Rule:
    """A pruning method: at these layers, these columns go; whether the gaps close."""

    layers: tuple[int, ...]
    gone: Callable[[int, Moment], set[int]]
    compact: bool


@dataclass
class Frozen:
    """What each rule dropped at each prompt: (rule, layer, prompt) -> columns."""

    choices: dict[tuple[int, int, int], set[int]] = field(default_factory=dict)


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
    return Row([vectors[i] for i in left], [visual[i] for i in left], numbers, [(0, len(left))])


def norm(x: Tensor, module: Any) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight


def later(number: Any, by: int) -> Any:
    """A position moved on."""
    return tuple(i + by for i in number) if isinstance(number, tuple) else number + by


def axis(frequency: int, rope: dict[str, Any]) -> int:
    """Which of (time, height, width) a frequency turns with."""
    sections = rope["mrope_section"]
    if rope.get("mrope_interleaved"):
        place = frequency % 3
        return place if place and frequency < 3 * sections[place] else 0
    return 0 if frequency < sections[0] else 1 if frequency < sections[0] + sections[1] else 2


def angles(numbers: list[Any], half: int, rope: dict[str, Any]) -> Tensor:
    """How far each frequency has turned at these positions: [length, half]."""
    if isinstance(numbers[0], tuple):
        turning = torch.tensor(numbers)[:, [axis(j, rope) for j in range(half)]]
    else:
        turning = torch.tensor(numbers)[:, None]
    return turning.float() / rope["rope_theta"] ** (torch.arange(half).float() / half)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary embedding of [length, d]."""
    half = x.shape[-1] // 2
    one, two = x[:, :half], x[:, half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


def attend(layer: Any, hidden: Tensor, numbers: list[Any]) -> tuple[Tensor, Tensor]:
    """(attention output [length, d], probabilities [heads, length, length]) of one layer."""
    attention = layer.self_attn
    d = attention.head_dim
    angle = angles(numbers, d // 2, attention.config.rope_parameters)
    x = norm(hidden, layer.input_layernorm)
    q, k, v = (getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
    heads, each = q.shape[1] // d, q.shape[1] // k.shape[1]
    future = torch.ones(len(x), len(x)).triu(1).bool()
    rows, outputs = [], []
    for head in range(heads):
        own, shared = slice(head * d, head * d + d), slice(head // each * d, head // each * d + d)
        query, key = q[:, own], k[:, shared]
        if hasattr(attention, "q_norm"):
            query, key = norm(query, attention.q_norm), norm(key, attention.k_norm)
        logits = rotate(query, angle) @ rotate(key, angle).T / math.sqrt(d)
        rows.append(logits.masked_fill(future, -math.inf).softmax(-1))
        outputs.append(rows[-1] @ v[:, shared])
    return attention.o_proj(torch.cat(outputs, -1)), torch.stack(rows)


def shift(numbers: dict[int, Any], closed: set[int]) -> dict[int, Any]:
    """Positions after the gaps of these columns closed."""
    return {i: later(number, -sum(j < i for j in closed)) for i, number in numbers.items()}


@torch.no_grad()
def run(model: Any, row: Row, rules: list[Rule], frozen: Frozen) -> tuple[Tensor, list[list[int]]]:
    """(logits of the columns that reach the end, columns alive in each layer); choices are made once and kept in `frozen`."""
    alive = list(range(len(row.vectors)))
    numbers = dict(enumerate(row.numbers))
    hidden, depths, decoder = torch.stack(row.vectors), [], model.get_decoder()
    before: Attention = ([], [])
    for depth, layer in enumerate(decoder.layers):
        here = [number for number, rule in enumerate(rules) if depth in rule.layers]
        latest, (start, end) = len(row.prompts) - 1, row.prompts[-1]
        earlier = {number: [frozen.choices[number, depth, turn] for turn in range(latest)] for number in here}
        gone = {number: set[int]().union(*sets) for number, sets in earlier.items()}
        dropped = set[int]().union(*gone.values())
        given = [i for i in alive if i not in dropped]
        closed = set[int]().union(*(gone[number] for number in here if rules[number].compact))
        following = attend(layer, hidden[[alive.index(i) for i in given]], [shift(numbers, closed)[i] for i in given])[1]
        for number in here:
            if (number, depth, latest) not in frozen.choices:
                left = [i for i in given if start <= i < end and i not in dropped]
                moment = Moment(
                    left, row.visual, end - 1, row.visual[start:end].count(True), before, (given, following.tolist())
                )
                frozen.choices[number, depth, latest] = rules[number].gone(depth, moment)
            dropped |= frozen.choices[number, depth, latest]
            if rules[number].compact:
                closed |= frozen.choices[number, depth, latest]
        numbers = shift(numbers, closed)
        left = [i for i in alive if i not in dropped]
        hidden, alive = hidden[[alive.index(i) for i in left]], left
        output, probabilities = attend(layer, hidden, [numbers[i] for i in alive])
        hidden = hidden + output
        x = norm(hidden, layer.post_attention_layernorm)
        hidden = hidden + layer.mlp.down_proj(torch.nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
        if depth < len(row.deep):
            hidden = torch.stack([x + row.deep[depth].get(i, 0) for x, i in zip(hidden, alive, strict=True)])
        before = (alive, probabilities.tolist())
        depths.append(alive)
    return model.lm_head(norm(hidden, decoder.norm)), depths


@torch.no_grad()
def greedy(
    model: Any, row: Row, rules: list[Rule], steps: int, frozen: Frozen | None = None
) -> tuple[list[int], list[Tensor], list[list[int]]]:
    """Greedy tokens, the logits of each, and the columns alive in each layer at the prompt."""
    frozen, tokens, logits, kept = Frozen() if frozen is None else frozen, [], [], []
    for _ in range(steps):
        every, depths = run(model, row, rules, frozen)
        kept = kept or depths
        logits.append(every[-1])
        tokens.append(int(logits[-1].argmax()))
        row = said(model, row, tokens[-1:])
    return tokens, logits, kept


@torch.no_grad()
def said(model: Any, row: Row, tokens: list[int]) -> Row:
    """The row with text behind it that is not a prompt."""
    for token in tokens:
        row = row.with_token(model.get_input_embeddings()(torch.tensor(token)))
    return row


@torch.no_grad()
def plain_logits(model: Any, row: Row) -> Tensor:
    """Logits [length, vocabulary] of the unhooked decoder over the row, no cache, positions given; the mask of ones keeps gaps
    from being taken for packed sequences."""
    embeds, numbers = torch.stack(row.vectors)[None], torch.tensor(row.numbers)
    more: dict[str, Any] = {}
    if row.deep:
        zero = torch.zeros_like(row.vectors[0])
        features = [torch.stack([layer.get(i, zero) for i in range(len(row.vectors))]) for layer in row.deep]
        more = {"visual_pos_masks": torch.ones(embeds.shape[:2]).bool(), "deepstack_visual_embeds": features}
    ones, places = torch.ones(embeds.shape[:2], dtype=torch.long), numbers.T[:, None] if numbers.ndim == 2 else numbers[None]
    decoder = model.get_decoder()
    out = decoder(inputs_embeds=embeds, position_ids=places, attention_mask=ones, use_cache=False, **more)
    return model.lm_head(out.last_hidden_state)[0]


def plain_greedy(model: Any, row: Row, steps: int) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens and the logits each was chosen from, everything run again at every step."""
    tokens: list[int] = []
    logits: list[Tensor] = []
    for _ in range(steps):
        logits.append(plain_logits(model, row)[-1])
        tokens.append(int(logits[-1].argmax()))
        row = said(model, row, tokens[-1:])
    return tokens, logits


def ranked(moment: Moment, attention: Attention, candidates: list[int], pool: str) -> list[int]:
    """Candidates from the most to the least attended by the last prompt token; mean or max over heads; the earlier first."""
    score = scores(moment, attention, candidates, pool)
    return sorted(candidates, key=lambda i: (-score[i], i))


def scores(moment: Moment, attention: Attention, candidates: list[int], pool: str) -> dict[int, float]:
    columns, rows = attention
    last = columns.index(moment.last)
    score = {}
    for i in candidates:
        values = [head[last][columns.index(i)] for head in rows]
        score[i] = max(values) if pool == "max" else sum(values) / len(values)
    return score


def seen_by_all(moment: Moment, candidates: list[int], asking: list[int]) -> list[int]:
    """Candidates from the most to the least attended by those of `asking` who see them, the largest over heads each time."""
    columns, rows = moment.previous
    score = {}
    for i in candidates:
        queries = [columns.index(q) for q in asking if q >= i]
        score[i] = sum(max(head[q][columns.index(i)] for head in rows) for q in queries) / len(queries)
    return sorted(candidates, key=lambda i: (-score[i], i))


def fastv(layer: int, keep: Callable[[int], int]) -> Rule:
    def gone(depth: int, moment: Moment) -> set[int]:
        images = [i for i in moment.alive if moment.visual[i]]
        return set(ranked(moment, moment.previous, images, "mean")[keep(len(images)) :])

    return Rule((layer,), gone, compact=False)


def fastv_threshold(layer: int, threshold: float) -> Rule:
    def gone(depth: int, moment: Moment) -> set[int]:
        images = [i for i in moment.alive if moment.visual[i]]
        score = scores(moment, moment.previous, images, "mean")
        most = max(score.values(), default=0)
        return {i for i in images if 1 - score[i] / most >= threshold and i != max(images, key=score.__getitem__)}

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


def context(
    layers: int,
    p: float | Callable[[int], float],
    query: str,
    protect: int,
    spans: tuple[slice, ...] = (),
    markers: bool = False,
) -> Rule:
    """`spans` of the prompt's text stay, and ask with the last token where `query` is "question"."""

    def gone(depth: int, moment: Moment) -> set[int]:
        text = [i for i in moment.alive if moment.visual[i] is False]
        start = moment.alive[0]
        entered = [i for i in range(start, moment.last + 1) if moment.visual[i] is False]
        stay = {i for span in spans for i in entered[span]} | {start, *moment.alive[-protect:]}
        if markers:
            stay |= {
                i for i in entered if any(start <= j <= moment.last and moment.visual[j] is not False for j in (i - 1, i + 1))
            }
        free = [i for i in text if i not in stay]
        if query == "last":
            order = ranked(moment, moment.previous, free, "max")
        else:
            asking = {i for span in spans for i in entered[span]} | {moment.last}
            order = seen_by_all(moment, free, sorted(asking) if query == "question" else moment.previous[0])
        rate = p if isinstance(p, float | int) else p(len(entered))
        return set(order[max(0, len(free) - math.floor(rate * len(text))) :])

    return Rule(tuple(range(1, layers + 1)), gone, compact=False)
