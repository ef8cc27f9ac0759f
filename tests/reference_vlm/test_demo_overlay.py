"""The demo's picture: a row for each method, a panel for each budget, answers marked where they are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from codebook_prune import RandomPruner, UniformPruner
from reference_vlm.demo_overlay import ASKED, SHOWN, draw_overlays, replies
from reference_vlm.questions import Question
from reference_vlm.scenes import make_scene


def test_the_scene_has_what_is_asked_about() -> None:
    scene = make_scene("test", SHOWN)
    assert scene.glyph is not None
    assert len(scene.objects) > 2
    assert ASKED == ("read", "count")


def test_a_panel_for_every_method_and_budget(tmp_path: Path, reference: tuple[Any, Any]) -> None:
    rows = {
        "uniform": [UniformPruner(keep_tokens=n) for n in (72, 16)],
        "random": [RandomPruner(keep_tokens=n) for n in (72, 16)],
    }
    draw_overlays(*reference, rows, tmp_path / "overlay.png")
    picture = Image.open(tmp_path / "overlay.png")
    assert picture.width == 3 * 480 + 2 * 8
    assert picture.height > 2 * 480
    assert [pruner.stats.tokens_after for row in rows.values() for pruner in row] == [[72, 72], [16, 16]] * 2


def test_wrong_answers_are_marked(reference: tuple[Any, Any]) -> None:
    scene = make_scene("test", SHOWN)
    asked = [Question("read", "What does the sign say?", answer) for answer in (scene.glyph_text, "none")]
    right, wrong = replies(*reference, scene, asked, None).split("\n")
    assert wrong == f"{right} (wrong)"
