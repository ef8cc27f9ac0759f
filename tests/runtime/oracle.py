"""The slow reference: one row at a time, tokens deleted by hand, explicit positions, no hooks, no cache, no batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from conftest import noise_image, tiny_processor
from torch import Tensor

from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import VisualTokens

PROCESSOR = tiny_processor()
QUESTIONS = ("describe the image .", "what color is the red circle ?", "is there a star or a ring and how many ?")


@dataclass(frozen=True)
class ProjectionPruner(Pruner):
    """Redundancy = the mean of the token's even features: the same in any batch, and easy to compute by hand."""

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.embeddings[:, ::2].mean(-1)


@dataclass(frozen=True)
class Prompt:
    """One row: its text and its images."""

    text: str
    images: tuple[Any, ...]


def prompt(seed: int, images: int) -> Prompt:
    """A row with that many images."""
    places = "".join(f"<image>\n{' and ' * (i > 0)}" for i in range(images))
    pictures = tuple(noise_image(10 * seed + i) for i in range(images))
    return Prompt(f"USER: {places}{QUESTIONS[seed % 3]} ASSISTANT:", pictures)


def inputs_of(prompts: list[Prompt]) -> dict[str, Any]:
    """What a user gives generate: padded on the left."""
    pictures = [picture for p in prompts for picture in p.images]
    encoded = PROCESSOR(text=[p.text for p in prompts], images=pictures or None, padding=True, return_tensors="pt")
    return {k: v for k, v in encoded.items() if k in ("input_ids", "attention_mask", "pixel_values")}


def turned(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same, padded on the right."""
    spare = [len(row) - int(row.sum()) for row in inputs["attention_mask"]]
    rolled = {
        name: torch.stack([row.roll(-n) for row, n in zip(inputs[name], spare, strict=True)])
        for name in ("input_ids", "attention_mask")
    }
    return inputs | rolled


@torch.no_grad()
def shortened(
    model: Any, p: Prompt, keep: int | Sequence[int], positions: str, score: Any = None, merge: Any = None
) -> tuple[Tensor, Tensor, int]:
    """(embeddings [1, kept, d], positions [1, kept], the position the next token has) of one row after pruning by hand; `keep`
    may be one number an image, `score` makes redundancies of an image's features, `merge` new vectors for its kept tokens."""
    inputs = inputs_of([p])
    vectors = list(model.get_input_embeddings()(inputs["input_ids"][0]))
    visual = [i for i, token in enumerate(inputs["input_ids"][0].tolist()) if token == model.config.image_token_id]
    gone: set[int] = set()
    for number, picture in enumerate(p.images):
        pixels = PROCESSOR.image_processor(picture, return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
        mine = visual[number * len(features) : (number + 1) * len(features)]
        for place, feature in zip(mine, features, strict=True):
            vectors[place] = feature
        scores = [f[::2].mean().item() for f in features] if score is None else score(features)
        ranked = sorted(range(len(mine)), key=lambda i: (scores[i], i))
        limit = keep if isinstance(keep, int) else keep[number]
        gone |= {mine[i] for i in ranked[limit:]}
        if merge is not None:
            kept = sorted(ranked[:limit])
            for i, vector in zip(kept, merge(features, kept, pixels), strict=True):
                vectors[mine[i]] = vector
    left = [i for i in range(len(vectors)) if i not in gone]
    numbers = left if positions == "original" else list(range(len(left)))
    following = len(vectors) if positions == "original" else len(left)
    return torch.stack([vectors[i] for i in left]).unsqueeze(0), torch.tensor([numbers]), following


@torch.no_grad()
def plain_logits(model: Any, embeds: Tensor, positions: Tensor) -> Tensor:
    """Logits [length, vocabulary] of a plain forward; the mask of ones keeps gaps from being taken for packed sequences."""
    ones = torch.ones(embeds.shape[:2], dtype=torch.long)
    hidden = model.get_decoder()(inputs_embeds=embeds, position_ids=positions, attention_mask=ones, use_cache=False)
    return model.lm_head(hidden.last_hidden_state)[0]


@torch.no_grad()
def extend(model: Any, row: tuple[Tensor, Tensor, int], ids: list[int]) -> tuple[Tensor, Tensor, int]:
    """The row with text tokens appended."""
    embeds, positions, following = row
    more = model.get_input_embeddings()(torch.tensor([ids]))
    numbers = torch.arange(following, following + len(ids)).unsqueeze(0)
    return torch.cat([embeds, more], 1), torch.cat([positions, numbers], 1), following + len(ids)


def greedy(model: Any, row: tuple[Tensor, Tensor, int], steps: int) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens and the logits each was chosen from, everything run again at every step."""
    tokens, logits = [], []
    for _ in range(steps):
        logits.append(plain_logits(model, row[0], row[1])[-1])
        tokens.append(int(logits[-1].argmax()))
        row = extend(model, row, tokens[-1:])
    return tokens, logits
