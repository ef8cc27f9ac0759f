"""The demo's picture: which visual tokens of one held-out image are kept, and what the model then answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from codebook_prune.overlay import draw_overlay, enlarged, save_picture, sheet
from reference_vlm.evaluate import answers, is_right
from reference_vlm.questions import Question, ask
from reference_vlm.scenes import GRID, Scene, make_scene, render
from reference_vlm.suites import Prompt

SHOWN = 241
"""The test scene: a printed character among several objects."""
ASKED = ("read", "count")
LETTERS = 1 / 20
"""Height of letters against a picture's: readable where a page shows the sheet at half its width."""


def draw_overlays(
    model: Any, processor: Any, pruners: Mapping[str, Sequence[Any]], path: Path, scene_number: int = SHOWN
) -> None:
    """Write a row of panels for each method: the whole image, then what each of its pruners kept, all with answers."""
    scene = make_scene("test", scene_number)
    image = render(scene)
    asked = [question for family in ASKED if (question := ask(scene, family, np.random.default_rng(0)))]
    pictures, captions = [], []
    for name, row in pruners.items():
        pictures.append(enlarged(image)[0])
        captions.append(f"unpruned, {GRID * GRID} tokens\n{replies(model, processor, scene, asked, None)}")
        for pruner in row:
            given = replies(model, processor, scene, asked, pruner)
            kept, position = pruner.stats.kept[0].cpu(), pruner.stats.position[0].cpu()
            pictures.append(draw_overlay(image, position, kept))
            captions.append(f"{name}, {int(kept.sum())} tokens\n{given}")
    save_picture(sheet(pictures, captions, 1 + max(map(len, pruners.values())), letters=LETTERS), path)


def replies(model: Any, processor: Any, scene: Scene, asked: Sequence[Question], pruner: Any | None) -> str:
    """Questions with the model's answers, a line each; wrong ones are marked."""
    with pruner(model) if pruner is not None else nullcontext():
        given = answers(model, processor, [Prompt((scene,), question) for question in asked])
    pairs = zip(asked, given, strict=True)
    return "\n".join(f"{q.text} {answer}{'' if is_right(q, answer) else ' (wrong)'}" for q, answer in pairs)
