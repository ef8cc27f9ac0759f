"""What repeats the frame before, against a loop over tokens; in models that take videos and in those that take images only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import noise_image, tiny_llava
from families import VIDEO, llava_next_video
from oracle import Prompt, inputs_of
from torch import Tensor

from codebook_prune import EVSPruner, UniformPruner
from codebook_prune.visual_tokens import VisualTokens

FRAMES, ROWS, COLUMNS, WIDTH = 5, 3, 4, 8


def film(seed: int = 0, *, video: bool = True) -> VisualTokens:
    """Frames in which some places stand still, some drift slowly, some jump; some tokens are missing."""
    draw = torch.Generator().manual_seed(seed)
    frames = [torch.randn(ROWS * COLUMNS, WIDTH, generator=draw)]
    pace = torch.tensor([0.0, 0.05, 0.3, 5.0])[torch.randint(4, (ROWS * COLUMNS, 1), generator=draw)]
    for _ in range(FRAMES - 1):
        frames.append(frames[-1] + pace * torch.randn(ROWS * COLUMNS, WIDTH, generator=draw))
    place = torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLUMNS))
    frame = torch.arange(FRAMES).repeat_interleave(ROWS * COLUMNS)
    whole = VisualTokens(
        torch.cat(frames), torch.zeros_like(frame), place.repeat(FRAMES, 1), frame=frame if video else None, is_video=video
    )
    return whole.only(torch.rand(len(frame), generator=draw) < 0.8)


def by_hand(tokens: VisualTokens, threshold: float | None) -> list[float | None]:
    """Cosine of every token to the one it is compared with, None where there is none before it."""
    latest: dict[tuple[int, ...], int] = {}
    found: list[float | None] = []
    pending: list[tuple[tuple[int, ...], int]] = []
    for i, (vector, place) in enumerate(zip(tokens.embeddings.double(), tokens.position.tolist(), strict=True)):
        assert tokens.frame is not None
        if i and tokens.frame[i] != tokens.frame[i - 1]:
            latest.update(pending)
            pending = []
        before = latest.get(tuple(place))
        cosine = None
        if before is not None:
            other = tokens.embeddings[before].double()
            cosine = float(vector @ other / (vector.norm() * other.norm()))
        found.append(cosine)
        if threshold is None or cosine is None or cosine < threshold:
            pending.append((tuple(place), i))
    return found


def kept_of(pruner: EVSPruner, *items: VisualTokens) -> list[Tensor]:
    kept = pruner.keep_each(items, pruner.budget.per_image([0] * len(items), torch.ones(1, 1)))
    return [
        torch.ones(len(tokens.embeddings), dtype=torch.bool) if one is None else one.mask
        for one, tokens in zip(kept, items, strict=True)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.995])
def test_a_threshold_compares_with_the_last_frame_that_was_kept(seed: int, threshold: float) -> None:
    tokens = film(seed)
    wanted = [cosine is None or cosine < threshold for cosine in by_hand(tokens, threshold)]
    (mask,) = kept_of(EVSPruner(threshold=threshold), tokens)
    assert mask.tolist() == wanted
    assert not all(wanted)


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_goes_to_what_changes_most_over_all_frames(seed: int) -> None:
    tokens = film(seed)
    cosines = by_hand(tokens, None)
    new = sum(cosine is None for cosine in cosines)
    for extra in (1, 5, 12):
        order = sorted(range(len(cosines)), key=lambda i: -2.0 if cosines[i] is None else cosines[i])  # type: ignore[arg-type, return-value]
        (mask,) = kept_of(EVSPruner(keep_tokens=new + extra), tokens)
        assert mask.nonzero().flatten().tolist() == sorted(order[: new + extra])


def test_a_budget_below_the_first_frame_is_spread_over_it() -> None:
    tokens = film()
    first = tokens.only(tokens.frame == 0)
    (mask,) = kept_of(EVSPruner(keep_tokens=4), tokens)
    (even,) = kept_of(EVSPruner(keep_tokens=4), first)
    uniform = UniformPruner(keep_tokens=4).keep(first)
    assert uniform is not None
    assert torch.equal(even, uniform)
    assert int(mask.sum()) == 4


def test_images_of_a_prompt_are_frames_and_share_their_budget() -> None:
    tokens = film()
    assert tokens.frame is not None
    images = [tokens.only(tokens.frame == number) for number in range(FRAMES)]
    images = [VisualTokens(one.embeddings, one.image, one.position) for one in images]
    (whole,) = kept_of(EVSPruner(threshold=0.9), tokens)
    parts = kept_of(EVSPruner(threshold=0.9), *images)
    for part, mask, image in zip(torch.split(whole, [len(i.embeddings) for i in images]), parts, images, strict=True):
        assert torch.equal(mask, part) or int(part.sum()) == 0  # an image keeps a token where a frame may lose all
        assert 0 < int(mask.sum()) <= len(image.embeddings)
    pooled = kept_of(EVSPruner(keep_tokens=6), *images)
    assert sum(int(mask.sum()) for mask in pooled) == 6 * FRAMES
    assert int(pooled[0].sum()) > 6
    own = kept_of(EVSPruner(keep_tokens=(1, 2, 3, 4, 5)), *images)
    assert [int(mask.sum()) for mask in own] == [1, 2, 3, 4, 5]


def test_crops_of_an_image_are_no_frames() -> None:
    tokens = film()
    image = VisualTokens(tokens.embeddings, tokens.image, tokens.position, frame=tokens.frame)
    assert float(EVSPruner(keep_tokens=4).score(image).max()) < -1
    again = kept_of(EVSPruner(threshold=0.9), image, image)
    assert [int(mask.sum()) for mask in again] == [len(tokens.embeddings), 1]


@torch.no_grad()
def test_in_a_model_that_takes_videos() -> None:
    model = llava_next_video("sdpa").model
    pixels = torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels[0, 1] = pixels[0, 0]
    pixels[0, 3] = pixels[0, 0]
    ids = torch.tensor([[1, 5, *[VIDEO] * 16, 7, 8]])
    with EVSPruner(threshold=0.9999)(model) as stats:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=pixels)
    assert stats.kept[0].view(4, 4).all(1).tolist() == [True, False, True, True]  # the fourth repeats the first, not the third
    assert stats.tokens_after == [12]


@torch.no_grad()
def test_prompts_of_a_batch_know_nothing_of_each_other() -> None:
    model: Any = tiny_llava()
    still = (noise_image(1), noise_image(1))
    prompts = [
        Prompt("USER: <image>\n<image>\nwhat ? ASSISTANT:", still),
        Prompt("USER: <image>\nwhat ? ASSISTANT:", still[:1]),
    ]
    with EVSPruner(threshold=0.9999)(model) as stats:
        model(**inputs_of(prompts))
    assert stats.tokens_after == [16, 1, 16]
    with EVSPruner(keep_ratio=0.75)(model) as stats:
        model(**inputs_of(prompts))
    assert stats.tokens_after == [16, 8, 12]
