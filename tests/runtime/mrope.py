"""Tiny random Qwen models, what a processor would give for them, and rows by hand with explicit M-RoPE positions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from layer_oracle import Row
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

IMAGE, VIDEO, START, END = 101, 102, 103, 104
DEEP = 2
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXT = {
    "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "initializer_range": 0.2}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


@functools.cache
def tiny(family: str, attention: str = "sdpa") -> Any:
    """Random weights, large enough that tokens matter; d = 64, two rows of two patches a visual token, DeepStack behind two
    layers of Qwen3-VL's six."""
    torch.manual_seed(0)
    sections = {"mrope_section": [3, 3, 2], "mrope_interleaved": True} if family == "qwen3_vl" else {"mrope_section": [2, 3, 3]}
    text = TEXT | {"num_hidden_layers": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **sections}}
    config: Any
    if family == "qwen2_vl":
        vision = VISION | {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "hidden_size": 64}
        config, build = Qwen2VLConfig(text_config=text, vision_config=vision, **IDS), Qwen2VLForConditionalGeneration
    elif family == "qwen2_5_vl":
        vision = VISION | {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 16,
            "fullatt_block_indexes": [1], "tokens_per_second": 4,
        }  # fmt: skip
        config, build = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IDS), Qwen2_5_VLForConditionalGeneration
    else:
        vision = VISION | {
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
        text = text | {"head_dim": 16}
        config, build = Qwen3VLConfig(text_config=text, vision_config=vision, **IDS), Qwen3VLForConditionalGeneration
    config._attn_implementation = attention
    model = build(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@dataclass(frozen=True)
class Item:
    """An image or a video of random pixels; grid: (frames, rows, columns) in patches."""

    kind: str
    seed: int
    grid: tuple[int, int, int]

    @property
    def pixels(self) -> Tensor:
        frames, rows, columns = self.grid
        return torch.randn(frames * rows * columns, 96, generator=torch.Generator().manual_seed(self.seed))


def image(seed: int, rows: int, columns: int) -> Item:
    return Item("image", seed, (1, rows, columns))


def video(seed: int, frames: int, rows: int, columns: int) -> Item:
    return Item("video", seed, (frames, rows, columns))


Prompt = Sequence[list[int] | Item]
PROMPTS: dict[str, Prompt] = {
    "text": [[5, 6, 7, 8, 9]],
    "one": [[5, 6, START], image(1, 8, 12), [END, 7, 8, 9]],
    "two": [[5, START], image(2, 4, 4), [END, 17, START], image(3, 12, 4), [END, 18, 19, 20, 21]],
    "video": [[5, 6, START], video(4, 3, 4, 8), [END, 7, 8]],
    "mixed": [[11, START], video(5, 2, 8, 4), [END, 12, START], image(6, 4, 8), [END, 13, 14]],
}


@dataclass
class Laid:
    """A prompt token by token: ids, item of each (-1: text), its frame, (time, height, width); following: of text."""

    ids: list[int]
    item: list[int]
    frame: list[int]
    places: list[tuple[int, int, int]]
    items: list[Item]
    following: int = 0

    def say(self, tokens: Sequence[int]) -> None:
        """Text: the three positions are one."""
        for token in tokens:
            self._add(token, -1, 0, (self.following,) * 3)
            self.following += 1

    def show(self, item: Item, family: str) -> None:
        """An image or a video: Qwen3-VL tells the time of a video's frames in text, the others in the first position."""
        frames, rows, columns = item.grid[0], item.grid[1] // 2, item.grid[2] // 2
        self.items.append(item)
        step = 0 if family == "qwen3_vl" else 4 if family == "qwen2_5_vl" else 1
        for frame in range(frames):
            if family == "qwen3_vl" and frame:
                self.say([END, 30 + frame, START])
            for row in range(rows):
                for column in range(columns):
                    place = (self.following + step * frame, self.following + row, self.following + column)
                    self._add(IMAGE if item.kind == "image" else VIDEO, len(self.items) - 1, frame, place)
            if family == "qwen3_vl" or frame == frames - 1:
                self.following += max(rows, columns)

    def _add(self, token: int, item: int, frame: int, place: tuple[int, int, int]) -> None:
        self.ids.append(token)
        self.item.append(item)
        self.frame.append(frame)
        self.places.append(place)


def lay(family: str, prompt: Prompt) -> Laid:
    """A prompt with explicit positions (the text behind an image goes on from its larger side)."""
    laid = Laid([], [], [], [], [])
    for part in prompt:
        if isinstance(part, Item):
            laid.show(part, family)
        else:
            laid.say(part)
    return laid


def inputs_of(family: str, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """What a processor gives: padded on the left."""
    laid = [lay(family, prompt) for prompt in prompts]
    longest = max(len(one.ids) for one in laid)
    ids = torch.tensor([[0] * (longest - len(one.ids)) + one.ids for one in laid])
    mask = torch.tensor([[0] * (longest - len(one.ids)) + [1] * len(one.ids) for one in laid])
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        items = [item for one in laid for item in one.items if item.kind == kind]
        if items:
            inputs[name] = torch.cat([item.pixels for item in items])
            inputs[f"{kind}_grid_thw"] = torch.tensor([item.grid for item in items])
    return inputs


def share(count: int, frames: int, frame: int) -> int:
    """What one of a video's frames keeps of `count` tokens: as many as every other, the first ones one more."""
    return count // frames + (frame < count % frames)


@torch.no_grad()
def row_of(model: Any, prompt: Prompt, keep: int | Sequence[int] = 10**6) -> Row:
    """One row with only `keep` tokens of each item (or its own number), those with the lowest mean of even features."""
    laid = lay(model.config.model_type, prompt)
    vectors = list(model.get_input_embeddings()(torch.tensor(laid.ids)))
    deep: list[dict[int, Tensor]] = [{} for _ in range(DEEP if model.config.model_type == "qwen3_vl" else 0)]
    gone: set[int] = set()
    for number, item in enumerate(laid.items):
        out = model.get_image_features(item.pixels, torch.tensor([item.grid]), return_dict=True)
        mine = [i for i, one in enumerate(laid.item) if one == number]
        for j, i in enumerate(mine):
            vectors[i] = out.pooler_output[0][j]
            for layer, features in enumerate(deep):
                features[i] = out.deepstack_features[layer][0][j]
        for frame in range(item.grid[0]):
            own = [i for i in mine if laid.frame[i] == frame]
            ranked = sorted(own, key=lambda i: (vectors[i][::2].mean().item(), i))
            gone |= set(ranked[share(keep if isinstance(keep, int) else keep[number], item.grid[0], frame) :])
    left = [i for i in range(len(vectors)) if i not in gone]
    following = tuple({left.index(i): feature for i, feature in features.items() if i not in gone} for features in deep)
    visual = [laid.item[i] >= 0 for i in left]
    return Row([vectors[i] for i in left], visual, [laid.places[i] for i in left], [(0, len(left))], following)


@dataclass(frozen=True)
class QwenFamily:
    """One of the Qwen families as the conformance matrix wants it."""

    name: str
    model: Any
    prompts: tuple[Prompt, ...] = tuple(PROMPTS.values())

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return inputs_of(self.name, prompts)

    def columns(self, prompt: Prompt) -> list[list[int]]:
        laid = lay(self.name, prompt)
        return [[i for i, item in enumerate(laid.item) if item == number] for number in range(len(laid.items))]

    def cells(self, prompt: Prompt) -> list[list[tuple[int, int, int]]]:
        grids = [(frames, rows // 2, columns // 2) for frames, rows, columns in (i.grid for i in lay(self.name, prompt).items)]
        return [list(itertools.product(*map(range, grid))) for grid in grids]

    def row(self, prompt: Prompt, budgets: Sequence[int] | None = None, positions: str = "original") -> Row:
        """Both policies leave every token its place."""
        return row_of(self.model, prompt, 10**6 if budgets is None else budgets)


QWEN = {name: lambda attention, name=name: QwenFamily(name, tiny(name, attention)) for name in FAMILIES}
