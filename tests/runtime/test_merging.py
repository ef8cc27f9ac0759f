"""Methods that put dropped tokens into kept ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import greedy_oracle as by_hand
import pytest
import torch
from conftest import tiny_llava
from oracle import inputs_of, prompt
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from codebook_prune import PoolPruner, UniformPruner, UserError, VisionZipPruner
from codebook_prune.pruners.base import Pruner
from codebook_prune.visual_tokens import EncoderView, VisualTokens

MODEL = tiny_llava()


def grid_of(rows: int, columns: int, seed: int = 0, d: int = 5) -> VisualTokens:
    vectors = torch.randn(rows * columns, d, generator=torch.Generator().manual_seed(seed))
    place = torch.arange(rows * columns)
    return VisualTokens(vectors, torch.zeros(rows * columns).long(), torch.stack([place // columns, place % columns], 1))


def merged(pruner: Pruner, tokens: VisualTokens) -> tuple[list[int], Tensor]:
    kept = pruner.keep_each([tokens], [None])[0]
    assert kept is not None
    assert kept.embeddings is not None
    return kept.mask.nonzero().squeeze(1).tolist(), kept.embeddings


def test_pooling_by_hand() -> None:
    """4 x 4 tokens to four cells are the four quarters; to three, the upper half and the two lower quarters."""
    tokens = grid_of(4, 4)
    quarters = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    kept, vectors = merged(PoolPruner(keep_tokens=4), tokens)
    assert kept == [0, 2, 8, 10]
    assert torch.allclose(vectors, torch.stack([tokens.embeddings[q].mean(0) for q in quarters]))
    kept, vectors = merged(PoolPruner(keep_tokens=3), tokens)
    assert kept == [1, 8, 10]
    assert torch.allclose(vectors[0], tokens.embeddings[:8].mean(0))
    assert torch.allclose(vectors[1:], torch.stack([tokens.embeddings[q].mean(0) for q in quarters[2:]]))


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (5, 7), (1, 9), (9, 2)])
def test_pooling_equals_the_loop_at_every_budget(rows: int, columns: int) -> None:
    tokens = grid_of(rows, columns)
    for keep in range(1, rows * columns):
        groups = by_hand.pooled(rows, columns, keep)
        assert sorted(i for cell in groups for i in cell) == list(range(rows * columns))  # every token in one cell
        assert len(groups) == keep == sum(map(bool, groups))
        expected = {by_hand.middle(cell, columns): tokens.embeddings[cell].mean(0) for cell in groups}
        kept, vectors = merged(PoolPruner(keep_tokens=keep), tokens)
        assert kept == sorted(expected)
        assert torch.allclose(vectors, torch.stack([expected[i] for i in kept]), atol=1e-6)


def test_a_grid_with_holes_is_refused() -> None:
    tokens = grid_of(4, 4)
    kept = UniformPruner(keep_tokens=12).keep(tokens)
    assert kept is not None
    with pytest.raises(UserError, match="first in the chain"):
        PoolPruner(keep_tokens=4).keep(tokens.only(kept))


def seen(attention: list[float], keys: Tensor, hidden: Tensor, cls: Tensor | None = None) -> VisualTokens:
    """Tokens whose encoder is known; the connector leaves vectors as they are."""
    view = EncoderView(hidden, torch.tensor(attention), keys, cls, lambda x: x)
    return dataclasses.replace(grid_of(1, len(attention)), encoder=view)


def test_visionzip_by_hand() -> None:
    """Five of eight: 5 / 32 of 5 is 1 contextual token; 3 dominant patches (1, 4, 6) beside [CLS]. Left are 0, 2, 3, 5, 7: 0 is
    the target, at stride 5, and gets the mean of the other four. [CLS] takes the first free place, 2, and comes first."""
    hidden, keys = torch.eye(8), torch.ones(8, 2)
    tokens = seen([0.1, 0.9, 0.1, 0.2, 0.8, 0.2, 0.7, 0.0], keys, hidden, cls=torch.full((8,), 5.0))
    kept, vectors = merged(VisionZipPruner(keep_tokens=5), tokens)
    assert kept == [0, 1, 2, 4, 6]
    target = torch.tensor([1, 0, 0.25, 0.25, 0, 0.25, 0, 0.25])
    assert torch.equal(vectors, torch.stack([torch.full((8,), 5.0), target, hidden[1], hidden[4], hidden[6]]))
    # two contextual ones at stride 2, 0 and 3; each other token to the one whose key looks its way: 2 to 0, 5 and 7 to 3
    keys = torch.tensor([[1.0, 0], [0, 0], [3, 1], [0, 2], [0, 0], [1, 4], [0, 0], [0, 1]])
    tokens = seen([0.1, 0.9, 0.1, 0.2, 0.8, 0.2, 0.7, 0.0], keys, hidden)
    kept, vectors = merged(VisionZipPruner(keep_tokens=5, contextual=0.4), tokens)
    assert kept == [0, 1, 3, 4, 6]
    assert torch.equal(vectors[0], torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0]))
    assert torch.equal(vectors[2], torch.tensor([0, 0, 0, 1, 0, 0.5, 0, 0.5]))


@pytest.mark.parametrize(("share", "keep"), [(5 / 32, 64), (5 / 32, 1), (0.5, 2), (0.3, 17), (0.0, 9), (1.0, 5), (1.0, 99)])
@pytest.mark.parametrize("with_cls", [True, False])
def test_visionzip_equals_the_loop(share: float, keep: int, with_cls: bool) -> None:
    generator = torch.Generator().manual_seed(keep)
    attention, keys, hidden, cls = (torch.rand(*shape, generator=generator) for shape in ((100,), (100, 3), (100, 4), (4,)))
    tokens = seen(attention.tolist(), keys, hidden, cls)
    plain = [x.double().tolist() for x in (attention, keys, hidden)]
    expected, rows = by_hand.visionzip(*plain, keep, share, cls.tolist() if with_cls else None)
    kept, vectors = merged(VisionZipPruner(keep_tokens=keep, contextual=share, with_cls=with_cls), tokens)
    assert kept == expected
    assert torch.allclose(vectors.double(), torch.tensor(rows).double(), atol=1e-5)


def test_the_papers_splits() -> None:
    pruner = VisionZipPruner(keep_tokens=1)
    for count, contextual in ((192, 30), (128, 20), (64, 10), (32, 5)):
        view = seen([0.0] * 576, torch.rand(576, 2), torch.rand(576, 2), cls=torch.rand(2)).encoder
        assert view is not None
        assert [len(part) for part in pruner._split(view, count)[:2]] == [count - contextual - 1, contextual]


class Reader(VisionZipPruner):
    """Remembers what it was shown of the encoder."""

    def select(self, images: Any, count: int | None) -> Tensor:
        VIEWS.extend(tokens.encoder for tokens in images)
        return super().select(images, count)


VIEWS: list[EncoderView] = []


def siglip_llava(attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """The tiny LLaVA with a tower that has no [CLS]."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision, text_config=MODEL.config.text_config, image_token_id=MODEL.config.image_token_id,
        image_seq_length=16, vision_feature_layer=-2, vision_feature_select_strategy="full",
    )  # fmt: skip
    config._attn_implementation = attention
    return LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
@pytest.mark.parametrize(("build", "cls"), [(lambda a: tiny_llava(attention=a), 1), (siglip_llava, 0)], ids=["clip", "siglip"])
def test_the_encoder_is_read_right(build: Any, cls: int) -> None:
    """Against the attention that eager transformers returns; the model itself uses SDPA."""
    inputs = inputs_of([prompt(2, 2)])
    VIEWS.clear()
    model = build("sdpa")
    with Reader(keep_tokens=3)(model) as stats:
        model(**inputs)
    assert stats.tokens_after == [3, 3]
    assert len(VIEWS) == 2
    tower = build("eager").model.vision_tower
    out = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True, return_dict=True)
    layer = tower.encoder.layers[-2]
    keys = layer.self_attn.k_proj(layer.layer_norm1(out.hidden_states[-3])).view(2, 16 + cls, 2, 16).mean(2)
    for i, view in enumerate(VIEWS):
        attention = out.attentions[-2][i].mean(0)
        assert torch.allclose(view.attention, attention[0, 1:] if cls else attention.mean(0), atol=1e-6)
        assert torch.allclose(view.hidden, out.hidden_states[-2][i, cls:], atol=1e-5)
        assert torch.allclose(view.keys, keys[i, cls:], atol=1e-5)
        assert (view.cls is None) == (cls == 0)
        assert view.cls is None or torch.allclose(view.cls, out.hidden_states[-2][i, 0], atol=1e-5)


def test_images_encoded_in_one_block_may_be_used_in_another() -> None:
    inputs = inputs_of([prompt(1, 1), prompt(2, 2)])
    pixels = inputs.pop("pixel_values")
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with VisionZipPruner(keep_tokens=5)(MODEL) as stats:
        expected = MODEL.generate(**inputs, pixel_values=pixels, **options)
        kept = stats.kept
    with VisionZipPruner(keep_ratio=1.0)(MODEL), torch.no_grad():
        encoded = MODEL.get_image_features(pixel_values=pixels, return_dict=True)
        other = MODEL.get_image_features(pixel_values=pixels.flip(0), return_dict=True)
    assert not torch.equal(encoded.pooler_output[0], other.pooler_output[0])
    with VisionZipPruner(keep_tokens=5)(MODEL) as stats:
        again = MODEL.generate(**inputs, mm_encoder_outputs={"image": encoded}, **options)
        assert all(torch.equal(a, b) for a, b in zip(stats.kept, kept, strict=True))
        beams = MODEL.generate(**inputs, pixel_values=pixels, num_beams=2, **options)
        assert all(torch.equal(a, b) for a, b in zip(stats.kept, [kept[i] for i in (0, 0, 1, 2, 1, 2)], strict=True))
    assert torch.equal(again, expected)
    assert beams.shape == expected.shape


def test_what_cannot_be_read_is_refused() -> None:
    inputs = inputs_of([prompt(1, 1)])
    with torch.no_grad():
        outside = MODEL.get_image_features(pixel_values=inputs.pop("pixel_values"), return_dict=True)
    with VisionZipPruner(keep_tokens=3)(MODEL), pytest.raises(UserError, match="not encoded inside a block"):
        MODEL.generate(**inputs, mm_encoder_outputs={"image": outside}, max_new_tokens=1)
    with pytest.raises(UserError, match="looks into the vision encoder"):
        VisionZipPruner(keep_tokens=3).keep(grid_of(4, 4))
    with pytest.raises(UserError, match="share of the budget"):
        VisionZipPruner(keep_tokens=3, contextual=1.5)
    model = tiny_llava()
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(UserError, match="vision encoder of llava cannot be read"), VisionZipPruner(keep_tokens=3)(model):
        pass


def test_leaving_the_block_restores_the_tower() -> None:
    layer = MODEL.model.vision_tower.encoder.layers[-2]
    config, hooks = layer.self_attn.config, len(layer._forward_hooks)
    with VisionZipPruner(keep_tokens=3)(MODEL):
        assert layer.self_attn.config is not config
    assert layer.self_attn.config is config
    assert len(layer._forward_hooks) == hooks
    assert not MODEL.model.vision_tower._forward_hooks
