"""One tiny random model a family, prompts for it, and what a slow hand says of both: where every visual token belongs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from layer_oracle import Row
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

IMAGE, VIDEO, PAD, WORDS = 90, 91, 0, range(5, 80)
VOCABULARY, SIDE, PATCH = 96, 32, 8
SQUARE = SIDE // PATCH

Cell = tuple[int, int, int]  # frame, row, column; row -1: a newline or separator, which is never pruned


@dataclass(frozen=True)
class Item:
    """One image or video in a prompt: text ids around its placeholders, pixels, and where each of its tokens belongs."""

    ids: tuple[int, ...]
    pixels: dict[str, Tensor]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Prompt:
    """One row: words, items between them, words."""

    items: tuple[Item, ...]
    seed: int

    @property
    def ids(self) -> list[int]:
        draw = torch.Generator().manual_seed(self.seed)
        found = [1, *words(draw, 2)]
        for item in self.items:
            found += [*item.ids, *words(draw, 3)]
        return [*found, *words(draw, 6)]


@dataclass(frozen=True)
class Family:
    """A tiny model and prompts for it: without items, with one, with two."""

    name: str
    model: Any
    prompts: tuple[Prompt, ...]
    empty: dict[str, Tensor] = field(default_factory=dict)  # what a prompt without items brings, where that is not nothing

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What a user gives generate: padded on the left."""
        width = max(len(p.ids) for p in prompts)
        ids = torch.tensor([[PAD] * (width - len(p.ids)) + p.ids for p in prompts])
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts])
        return {"input_ids": ids, "attention_mask": mask, **self.pixels(prompts)}

    def pixels(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        rows = [self.row_pixels(p) for p in prompts]
        return {name: padded_cat([row[name] for row in rows if name in row]) for name in {k: 0 for row in rows for k in row}}

    def row_pixels(self, p: Prompt) -> dict[str, Tensor]:
        if self.empty:  # tiles of a row stand in one tensor [1, tiles, ...]
            parts = [item.pixels for item in p.items] or [self.empty]
            return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
        names = {name: 0 for item in p.items for name in item.pixels}
        return {name: padded_cat([item.pixels[name] for item in p.items if name in item.pixels]) for name in names}

    def columns(self, p: Prompt) -> list[list[int]]:
        """Where the tokens of each item stand."""
        found, start = [], 1 + 2
        for one in p.items:
            found.append([start + i for i, token in enumerate(one.ids) if token in (IMAGE, VIDEO)])
            start += len(one.ids) + 3
        return found

    def cells(self, p: Prompt) -> list[list[Cell]]:
        """Where they belong."""
        return [list(one.cells) for one in p.items]

    @torch.no_grad()
    def vectors(self, p: Prompt) -> list[Tensor]:
        """A row's vectors with the encoder's features written over the placeholders."""
        base, ids, pixels = self.model.base_model, p.ids, self.row_pixels(p)
        vectors = list(self.model.get_input_embeddings()(torch.tensor(ids)))
        for placeholder, encode in ((IMAGE, "get_image_features"), (VIDEO, "get_video_features")):
            places = [i for i, token in enumerate(ids) if token == placeholder]
            if places:
                mine = {name: x for name, x in pixels.items() if ("videos" in name) == (placeholder == VIDEO)}
                out = getattr(base, encode)(**mine, return_dict=True).pooler_output
                features = [v for part in out for v in part.flatten(0, -2)]
                for place, feature in zip(places, features, strict=True):
                    vectors[place] = feature
        return vectors

    def row(self, p: Prompt, budgets: Sequence[int] | None = None, positions: str = "compact") -> Row:
        """A row of which each item keeps so many tokens (None: all), spread over its frames."""
        vectors, gone = self.vectors(p), set[int]()
        visual: list[bool | None] = [False] * len(vectors)
        for number, (own, cells) in enumerate(zip(self.columns(p), self.cells(p), strict=True)):
            frames: dict[int, list[int]] = {}
            for column, (frame, row, _) in zip(own, cells, strict=True):
                visual[column] = True if row >= 0 else None
                if row >= 0:
                    frames.setdefault(frame, []).append(column)
            total = sum(map(len, frames.values()))
            stays = total if budgets is None else min(budgets[number], total)
            exact = {frame: Fraction(stays * len(members), total) for frame, members in frames.items()}
            share = {frame: int(x) for frame, x in exact.items()}
            for frame in sorted(frames, key=lambda f: (share[f] - exact[f], f))[: stays - sum(share.values())]:
                share[frame] += 1
            for frame, members in frames.items():
                ranked = sorted(members, key=lambda i: (vectors[i][::2].mean().item(), i))
                gone |= set(ranked[share[frame] :])
        left = [i for i in range(len(vectors)) if i not in gone]
        numbers = left if positions == "original" else list(range(len(left)))
        return Row([vectors[i] for i in left], [visual[i] for i in left], numbers, [(0, len(left))])


def padded_cat(parts: Sequence[Tensor]) -> Tensor:
    """Tensors joined along the first dimension, zeros where the others are shorter."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    found = parts[0].new_zeros(sum(len(part) for part in parts), *shape)
    start = 0
    for part in parts:
        found[(slice(start, start + len(part)), *(slice(0, n) for n in part.shape[1:]))] = part
        start += len(part)
    return found


def words(draw: torch.Generator, count: int) -> list[int]:
    return torch.randint(WORDS.start, WORDS.stop, (count,), generator=draw).tolist()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(frame: int, rows: int, columns: int, *, newline: bool = False) -> list[Cell]:
    """A raster, each row closed by a newline where the family has one."""
    found = []
    for row in range(rows):
        found += [(frame, row, column) for column in range(columns)] + [(frame, -1, -1)] * newline
    return found


def item(placeholder: int, pixels: dict[str, Tensor], cells: Sequence[Cell]) -> Item:
    return Item((placeholder,) * len(cells), pixels, tuple(cells))


def clip(**changes: Any) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH,
        initializer_range=0.1, **changes,
    )  # fmt: skip


def siglip() -> SiglipVisionConfig:
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    config.vision_use_head = False
    return config


TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": PATCH, "initializer_range": 0.1,
}  # fmt: skip

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def ready(kind: Any, config: Any, attention: str) -> Any:
    """A model of random weights in eval mode that generates to the end."""
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = kind(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def prompts_of(one: Sequence[Item], two: Sequence[Item]) -> tuple[Prompt, ...]:
    return Prompt((), 1), Prompt(tuple(one), 2), Prompt(tuple(two), 3)


PINPOINTS = [[32, 64], [64, 32], [64, 64]]  # (height, width)


def unpadded(height: int, width: int) -> tuple[int, int, int, int]:
    """(crops high, crops wide, rows, columns) of an any-resolution image of these pixels, the long way round.

    The pinpoint that keeps most pixels, of equal ones the smaller; scaled to fit, centred, and of the patches whole rows
    (columns) of padding removed on both sides.
    """

    def worth(point: list[int]) -> tuple[int, int]:
        scale = min(point[0] / height, point[1] / width)
        kept = min(int(height * scale) * int(width * scale), height * width)
        return kept, -point[0] * point[1]

    high, wide = max(PINPOINTS, key=worth)
    rows, columns = high // PATCH, wide // PATCH
    if width / height > wide / high:
        rows -= 2 * ((rows - int(columns * height / width)) // 2)
    else:
        columns -= 2 * ((columns - int(rows * width / height)) // 2)
    return high // SIDE, wide // SIDE, rows, columns


def any_resolution_image(seed: int, height: int, width: int) -> Item:
    """An overview, then what unpadding leaves of the crops' patches, a newline behind each row."""
    high, wide, rows, columns = unpadded(height, width)
    pixels = {"pixel_values": noise(seed, 1, 1 + high * wide, 3, SIDE, SIDE), "image_sizes": torch.tensor([[height, width]])}
    return item(IMAGE, pixels, grid(0, SQUARE, SQUARE) + grid(1, rows, columns, newline=True))


def single_crop_image(seed: int, height: int, width: int) -> Item:
    """One of several images in a prompt: an overview and a newline."""
    pixels = {"pixel_values": noise(seed, 1, 1, 3, SIDE, SIDE), "image_sizes": torch.tensor([[height, width]])}
    return item(IMAGE, pixels, [*grid(0, SQUARE, SQUARE), (0, -1, -1)])


def with_pixels(one: Item, **more: Tensor) -> Item:
    return replace(one, pixels=one.pixels | more)


def llava(attention: str) -> Family:
    config = LlavaConfig(
        vision_config=clip(),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        image_seq_length=16,
    )
    model = ready(LlavaForConditionalGeneration, config, attention)
    images = [item(IMAGE, {"pixel_values": noise(80 + i, 1, 3, SIDE, SIDE)}, grid(0, SQUARE, SQUARE)) for i in range(3)]
    return Family("llava", model, prompts_of(images[:1], images[1:]))


def llava_next(attention: str) -> Family:
    config = LlavaNextConfig(
        vision_config=clip(), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, vision_feature_layer=-2,
        image_grid_pinpoints=PINPOINTS, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = ready(LlavaNextForConditionalGeneration, config, attention)
    images = [any_resolution_image(*size) for size in ((1, 24, 60), (2, 60, 40), (3, 50, 50))]
    return Family("llava_next", model, prompts_of(images[:1], images[1:]))


def llava_next_video(attention: str) -> Family:
    config = LlavaNextVideoConfig(
        vision_config=clip(), text_config=MistralConfig(**TEXT, sliding_window=None), image_token_index=IMAGE,
        video_token_index=VIDEO, vision_feature_layer=-2, image_grid_pinpoints=PINPOINTS, spatial_pool_stride=2,
    )  # fmt: skip
    model = ready(LlavaNextVideoForConditionalGeneration, config, attention)
    frames = [c for f in range(3) for c in grid(f, SQUARE // 2, SQUARE // 2)]
    videos = [item(VIDEO, {"pixel_values_videos": noise(10 + i, 1, 3, 3, SIDE, SIDE)}, frames) for i in range(2)]
    images = [any_resolution_image(4, 24, 60), any_resolution_image(5, 60, 40)]
    prompts = prompts_of(videos[:1], [images[0], videos[1]])
    return Family("llava_next_video", model, (*prompts, Prompt((images[1],), 4)))


def llava_onevision(attention: str) -> Family:
    config = LlavaOnevisionConfig(
        vision_config=siglip(), text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    model = ready(LlavaOnevisionForConditionalGeneration, config, attention)
    half = SQUARE // 2
    frames = [c for f in range(3) for c in grid(f, half, half)] + [(2, -1, -1)]
    video = item(VIDEO, {"pixel_values_videos": noise(20, 1, 3, 3, SIDE, SIDE)}, frames)
    one = with_pixels(any_resolution_image(5, 24, 60), batch_num_images=torch.tensor([1]))
    single = [single_crop_image(6 + i, *size) for i, size in enumerate(((24, 60), (60, 40)))]
    several = [with_pixels(single[0], batch_num_images=torch.tensor([2])), single[1]]
    return Family("llava_onevision", model, (*prompts_of([one], several), Prompt((video,), 4)))


def video_llava(attention: str) -> Family:
    config = VideoLlavaConfig(
        vision_config=clip(), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = ready(VideoLlavaForConditionalGeneration, config, attention)
    frames = [c for f in range(8) for c in [(f, -1, -1), *grid(f, SQUARE, SQUARE)]]
    video = item(VIDEO, {"pixel_values_videos": noise(30, 1, 8, 3, SIDE, SIDE)}, frames)
    images = [item(IMAGE, {"pixel_values": noise(31 + i, 1, 3, SIDE, SIDE)}, grid(0, SQUARE, SQUARE)) for i in range(2)]
    return Family("video_llava", model, prompts_of([video], images))


def vipllava(attention: str) -> Family:
    config = VipLlavaConfig(
        vision_config=clip(), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, vision_feature_layers=[-2, -1]
    )
    model = ready(VipLlavaForConditionalGeneration, config, attention)
    images = [item(IMAGE, {"pixel_values": noise(40 + i, 1, 3, SIDE, SIDE)}, grid(0, SQUARE, SQUARE)) for i in range(3)]
    return Family("vipllava", model, prompts_of(images[:1], images[1:]))


def internvl(attention: str) -> Family:
    vision = TOWER | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = ready(InternVLForConditionalGeneration, config, attention)
    half = SQUARE // 2
    images = []
    for i, tiles in enumerate((3, 1, 5)):
        cells = [c for tile in range(tiles) for c in grid(tile, half, half)]
        one = item(IMAGE, {"pixel_values": noise(50 + i, tiles, 3, SIDE, SIDE)}, cells)
        images.append(replace(one, ids=(81, *one.ids, 82)))
    return Family("internvl", model, prompts_of(images[:1], images[1:]))


FAKE, WHOLE, TILE, BREAK = 83, 84, 85, 86


def tiled(seed: int, rows: int, columns: int) -> Item:
    """Tiles with their row and column as text in front, line breaks behind the rows, the whole image last."""
    half, ids = SQUARE // 2, []
    for _ in range(rows):
        for column in range(columns):
            ids += [FAKE, TILE if column == 0 else TILE + 2, *[IMAGE] * half**2]
        ids.append(BREAK)
    ids += [FAKE, WHOLE, *[IMAGE] * half**2, FAKE]
    tiles = rows * columns + 1
    pixels = {
        "pixel_values": noise(seed, 1, tiles, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.ones(1, tiles, SIDE, SIDE, dtype=torch.long),
    }
    return Item(tuple(ids), pixels, tuple(c for tile in range(tiles) for c in grid(tile, half, half)))


def tile_family(kind: Any, config: Any, attention: str, vision: Any) -> Family:
    text = LlamaConfig(**TEXT)
    made = config(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD)
    made.tie_word_embeddings = False
    model = ready(kind, made, attention)
    empty = {
        "pixel_values": torch.zeros(1, 0, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.zeros(1, 0, SIDE, SIDE, dtype=torch.long),
    }
    return Family(made.model_type, model, prompts_of([tiled(60, 1, 2)], [tiled(61, 0, 0), tiled(62, 2, 1)]), empty)


def idefics3(attention: str) -> Family:
    return tile_family(Idefics3ForConditionalGeneration, Idefics3Config, attention, TOWER)


def smolvlm(attention: str) -> Family:
    return tile_family(SmolVLMForConditionalGeneration, SmolVLMConfig, attention, TOWER)


FAMILIES: dict[str, Callable[[str], Family]] = {
    f.__name__: f for f in (llava_next, llava_onevision, internvl, llava_next_video, video_llava, vipllava, idefics3, smolvlm)
}
