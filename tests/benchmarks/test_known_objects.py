"""The yardstick that knows the objects keeps what it says."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.known_objects import KnownObjectsPruner, order
from reference_vlm.evaluate import inputs_of, object_tokens
from reference_vlm.scenes import GRID, PATCH, make_scene
from reference_vlm.suites import make_suite


def test_objects_take_turns_from_their_centres() -> None:
    for index in range(20):
        scene = make_scene("validation", index)
        items = [*scene.objects, *([scene.glyph] if scene.glyph else [])]
        ordered = order(scene, 0)
        on_objects = object_tokens(scene)
        assert sorted(ordered) == list(range(GRID * GRID))
        assert on_objects[ordered[: on_objects.sum()]].all()
        for item, token in zip(items, ordered, strict=False):
            row, column = divmod(token, GRID)
            assert abs((column + 0.5) * PATCH - item.center[0]) <= PATCH
            assert abs((row + 0.5) * PATCH - item.center[1]) <= PATCH


def test_a_share_goes_to_the_background(reference: tuple[Any, Any]) -> None:
    model, processor = reference
    prompts = make_suite("image", "validation", 3, ("color",))
    pruner = KnownObjectsPruner(iter([p.scene for p in prompts]), keep_tokens=16)
    with torch.inference_mode(), pruner(model):
        model(**inputs_of(processor, prompts))
    assert pruner.stats.tokens_after == [16, 16, 16]
    for prompt in prompts:
        kept = order(prompt.scene, 4)[:16]
        assert (~object_tokens(prompt.scene)[kept]).sum() >= 4
