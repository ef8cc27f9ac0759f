"""Training rows of the reference VLM: pictures, a text, and many independent questions packed behind one shared prefix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from reference_vlm.questions import Question, ask_many
from reference_vlm.scenes import GRID, SMALLEST, Scene, draw_size, make_scene
from reference_vlm.suites import IMAGES, VIDEO, ask_suite, facts, lead_of, make_images, make_video

IGNORE = -100
FAR = 7
"""Least width of an object in a third of the training pictures and in all small ones: real ones are also taken from afar."""
KINDS = {"image": 0.28, "images": 0.22, "video": 0.22, "text": 0.28}
"""Share of the steps of stage 1 spent on single pictures, several, videos, and pictures with a long text."""


@dataclass(frozen=True)
class Sheet:
    """One training row: pictures with the words before each, a text after them, and independent questions."""

    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]
    lead: tuple[str, ...] = ("",)
    context: str = ""


class Packer:
    """Turns sheets of equally many and equally large pictures into one batch: a shared prefix, then independent segments."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.image = tokenizer.convert_tokens_to_ids("<image>")

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of a prompt."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def prefix(self, sheet: Sheet) -> list[int]:
        """Everything before the question."""
        out = list(self.tokenizer("USER:").input_ids)
        for lead, scene in zip(sheet.lead, sheet.scenes, strict=True):
            out += self.ids(lead) + [self.image] * int(scene.visible.sum())
        return out + self.ids(sheet.context)

    def segments(self, sheet: Sheet) -> list[tuple[list[int], list[int]]]:
        """(ids, labels) of each question; labels mark the answer and its </s>."""
        out = []
        for q in sheet.questions:
            prompt, answer = self.ids(f"{q.text} ASSISTANT:"), [*self.ids(q.answer), self.tokenizer.eos_token_id]
            out.append((prompt + answer, [IGNORE] * len(prompt) + answer))
        return out

    def __call__(self, sheets: list[Sheet]) -> dict[str, Tensor]:
        """ids, positions, labels [batch, length]; mask [batch, 1, length, length] additive; visible [pictures, 144] bool."""
        prefixes, rows = [self.prefix(s) for s in sheets], [self.segments(s) for s in sheets]
        length = max(len(p) + sum(len(ids) for ids, _ in row) for p, row in zip(prefixes, rows, strict=True))
        batch = len(sheets)
        ids = torch.full((batch, length), self.tokenizer.pad_token_id)
        labels = torch.full((batch, length), IGNORE)
        positions = torch.arange(length).repeat(batch, 1)
        segment = torch.zeros(batch, length, dtype=torch.long)
        for b, (prefix, row) in enumerate(zip(prefixes, rows, strict=True)):
            start = at = len(prefix)
            ids[b, :start] = torch.tensor(prefix)
            for k, (seg, lab) in enumerate(row, 1):
                end = at + len(seg)
                ids[b, at:end], labels[b, at:end] = torch.tensor(seg), torch.tensor(lab)
                positions[b, at:end] = torch.arange(start, start + len(seg))
                segment[b, at:end] = k
                at = end
            segment[b, at:] = -1
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = segment[:, :, None] == segment[:, None, :]
        mask = causal & (same | (segment == 0)[:, None, :])
        return {
            "ids": ids,
            "labels": labels,
            "positions": positions,
            "mask": torch.zeros(mask.shape).masked_fill(~mask, -1e9)[:, None],
            "visible": torch.from_numpy(np.stack([scene.visible for s in sheets for scene in s.scenes])),
        }


def draw_sheets(step: int, budget: int, rng: np.random.Generator) -> list[Sheet]:
    """Training rows of one step, all of one drawn kind and picture size, as many as the budget of tokens allows.

    Attention's cost grows with a row's length, so long rows are fewer than `budget / length`.
    """
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    pictures = {"images": int(rng.integers(2, 5)), "video": int(rng.integers(3, 5))}.get(kind, 1)
    columns, rows = draw_size(rng) if pictures == 1 or rng.random() < 0.5 else (GRID, GRID)
    if kind == "video" and min(columns, rows) < 4:
        columns, rows = 6, 6
    words = int(16 * 64 ** rng.random()) if kind == "text" else 0
    length = pictures * columns * rows + words + 110
    number = max(1, round(2 * budget / (length * (1 + length / 254))))
    first = (100_000 + step) * 4096
    return [make_sheet(kind, first + i, pictures, (columns, rows), words, rng) for i in range(number)]


def make_sheet(kind: str, index: int, pictures: int, size: tuple[int, int], words: int, rng: np.random.Generator) -> Sheet:
    """Draw one training row of a kind in `KINDS`; `index` names its scenes."""
    if kind == "images":
        scenes = make_images("train", index, pictures, size)
        return Sheet(tuple(scenes), ask_suite(IMAGES, scenes, 12, rng), lead_of(kind, pictures))
    frames = make_video("train", index, pictures, size) if kind == "video" else None
    if frames is not None:
        about = ask_suite(VIDEO, frames, 6, rng)
        moves = tuple(q for q in about if q.family != "position_in")  # one of each kind a video: they count twice
        still = ask_many(frames[0], 3, rng, ("color", "shape", "count", "exist"))
        return Sheet(tuple(frames), (*about, *moves, *still), lead_of(kind, pictures))
    far = index % 3 == 0 or size[0] * size[1] < GRID * GRID // 2
    scene = make_scene("train", index, size=size, smallest=FAR if far else SMALLEST)
    number = pictures if kind == "video" else 1  # nothing in it can move: a still video
    questions = tuple(ask_many(scene, 14 if words else 10, rng))  # behind a long prefix questions cost little
    return Sheet((scene,) * number, questions, lead_of(kind, number), facts(rng, words) if words else "")
