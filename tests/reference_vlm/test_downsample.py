"""The control that gives the reference VLM a smaller picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.downsample import CornerPruner, shrunk, smaller_grid
from reference_vlm.evaluate import prompt_of
from reference_vlm.scenes import make_scene, render


@pytest.mark.parametrize(
    ("tokens", "grid"), [(72, (8, 9)), (47.5, (7, 7)), (31.7, (5, 6)), (15.8, (4, 4)), (8, (3, 3)), (1, (1, 1)), (9, (3, 3))]
)
def test_the_grid_nearest_to_a_budget(tokens: float, grid: tuple[int, int]) -> None:
    assert smaller_grid(tokens) == grid


def test_a_shrunk_picture_lies_in_the_corner() -> None:
    picture = Image.new("RGB", (96, 96), (200, 10, 10))
    picture.paste((10, 10, 200), (48, 0, 96, 96))
    pixels = np.asarray(shrunk(picture, 4, 6))
    assert pixels.shape == (96, 96, 3)
    assert (pixels[:32, :16] == (200, 10, 10)).all()
    assert (pixels[:32, 32:48] == (10, 10, 200)).all()
    assert len(np.unique(pixels[32:])) == len(np.unique(pixels[:, 48:])) == 1  # grey


def test_only_the_corner_enters(reference: tuple[Any, Any]) -> None:
    model, processor = reference
    picture = shrunk(render(make_scene("validation", 3)), 5, 6)
    inputs = processor(images=[picture], text=[prompt_of(processor, "what color is the circle ?")], return_tensors="pt")
    with CornerPruner(rows=5, columns=6)(model) as stats, torch.no_grad():
        model(**inputs)
    assert stats.tokens_after == [30]
    assert bool(stats.kept[0].view(12, 12)[:5, :6].all())
