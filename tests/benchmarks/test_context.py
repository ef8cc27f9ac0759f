"""The context and ablation benchmarks ask and build what their tables say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from codebook_folder import write_codebook

from benchmarks.ablation import VARIANTS, pruner_of, questions_about, settings_of
from benchmarks.context import blank, prompts_of, rows_to_run
from codebook_prune import Codebook, RateCurve
from codebook_schemas import BuildConfig
from reference_vlm.suites import SUITES


def codebook_in(folder: Path, model: Any) -> Codebook:
    prototypes = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    return Codebook.from_pretrained(write_codebook(folder / "codebook", model, prototypes))


def test_texts_are_as_long_as_the_row_says() -> None:
    prompts = prompts_of("validation", 128, 12)
    assert [p.question.family for p in prompts] == [f for f in SUITES["text"][1] for _ in range(2)]
    assert all(128 <= len(p.context.split()) < 150 for p in prompts)


def test_blank_images_show_nothing() -> None:
    scene = prompts_of("validation", 128, 6)[0].scene
    pixels = np.asarray(blank(255)(scene))
    assert pixels.shape == (96, 96, 3)
    assert (pixels == 255).all()


def test_every_row_of_the_context_table_can_run(tmp_path: Path, reference: tuple[Any, Any]) -> None:
    codebook = codebook_in(tmp_path, reference[0])
    methods = rows_to_run(codebook, RateCurve(0, 0, 0.1))
    assert {f"context p=0.3 N={n}" for n in (2, 3, 4)} <= set(methods)
    assert "codebook and diversity 22% | context p=0.3" in methods
    assert set(methods) - set(rows_to_run(codebook, None)) == {"context, fitted rate"}


def test_every_variant_differs_and_is_valid(tmp_path: Path, reference: tuple[Any, Any]) -> None:
    codebook = codebook_in(tmp_path, reference[0])
    seen = set()
    for variant in VARIANTS:
        config = BuildConfig.parse(settings_of(variant, [Path("a.tar")]))
        pruner = str(pruner_of(variant, codebook, 0.22))
        seen.add((config.content_hash, variant.images, variant.backgrounds, variant.asked, variant.rounded, pruner))
    assert len(seen) == len(VARIANTS)


def test_a_codebook_of_some_backgrounds_is_asked_about_others_beside_one_of_all() -> None:
    named = {variant.name: variant for variant in VARIANTS}
    for style in ("plain", "clutter"):
        others = named[f"codebook of {style} only, asked about others"]
        only = named[f"codebook without {style}, asked about {style}"]
        for variant, baseline in (
            (others, named[f"codebook of all backgrounds, asked about others than {style}"]),
            (only, named[f"codebook of all backgrounds, asked about {style}"]),
        ):
            assert not set(variant.backgrounds) & set(variant.asked)
            assert (baseline.images, baseline.asked, baseline.backgrounds) == (variant.images, variant.asked, ())
            prompts = questions_about(variant.asked, 16)
            assert {p.scene.background for p in prompts} <= set(variant.asked)
            assert [p.question.family for p in prompts] == [f for f in SUITES["image"][1] for _ in range(2)]
