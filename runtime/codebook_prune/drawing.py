"""Answers as pictures: what each pruner kept of an image or of a video's frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from codebook_prune.answer import Run
from codebook_prune.media import Media
from codebook_prune.overlay import draw_overlay, enlarged, save_bytes, save_picture, seen_box, sheet
from codebook_prune.video import video_bytes

COLUMNS = 4


def draw_answer(media: Media, run: Run, image_processor: Any, path: Path) -> None:
    """Write what one pruner kept: images beside themselves; of a video a contact sheet, or, to an .mp4, a video.

    Raises:
        UserError: the file cannot be written.
    """
    drawn, counts = kept_pictures(media, run, image_processor)
    if path.suffix.lower() == ".mp4":
        fps = 1 / (media.seconds[1] - media.seconds[0]) if len(media.seconds) > 1 else 1.0
        save_bytes(video_bytes(drawn, fps), path)
    elif media.is_video:
        captions = [f"{time:.1f} s: {count}" for time, count in zip(media.seconds, counts, strict=True)]
        save_picture(sheet(drawn, captions, min(COLUMNS, math.ceil(math.sqrt(len(drawn))))), path)
    else:
        whole = [enlarged(picture)[0] for picture in media.pictures]
        pairs = [picture for pair in zip(whole, drawn, strict=True) for picture in pair]
        save_picture(sheet(pairs, before_and_after(run, counts), 2), path)


def draw_comparison(media: Media, names: Sequence[str], runs: Sequence[Run], image_processor: Any, path: Path) -> None:
    """Write what several pruners kept of one input, with their answers: images side by side, a row of frames each for a video.

    Raises:
        UserError: the file cannot be written.
    """
    pictures: list[Image.Image] = []
    captions: list[str] = []
    for name, run in zip(names, runs, strict=True):
        drawn, counts = [enlarged(p)[0] for p in media.pictures], [""] * len(media.pictures)
        if run.kept:
            drawn, counts = kept_pictures(media, run, image_processor)
        pictures += drawn
        times = [f"{time:.1f} s  {count}".strip() for time, count in zip(media.seconds, counts, strict=False)]
        first = "\n".join([*times[:1], f"{name}: {run.tokens}, prefill {run.prefill_ms:.0f} ms", run.answer])
        captions += [first, *times[1:]]
    columns = len(media.pictures) if len(media.pictures) > 1 else min(COLUMNS, len(pictures))
    save_picture(sheet(pictures, captions, columns), path)


def before_and_after(run: Run, counts: Sequence[str]) -> list[str]:
    """Captions of images beside what was kept of them: of all crops of a single image, else of what is shown of each."""
    single = [(str(run.tokens_before), str(run.tokens_final))]
    pairs = single if len(counts) == 1 else [(count.split()[-1], count.split()[0]) for count in counts]
    return [text for before, kept in pairs for text in (f"{before} tokens", f"{kept} tokens kept")]


def kept_pictures(media: Media, run: Run, image_processor: Any) -> tuple[list[Image.Image], list[str]]:
    """Every picture with what was dropped faded, and `20 of 144` for each.

    Where a model sees an image in several crops this shows the last, which covers all of it; where it joins frames, each of
    them shows what they share.
    """
    grids = [
        (position[frame == number], kept.cpu()[frame == number])
        for position, kept, frame in zip(run.position, run.kept, run.frame, strict=True)
        for number in torch.unique(frame).tolist()
    ]
    drawn, counts = [], []
    for number, picture in enumerate(media.pictures):
        position, kept = grids[-(-(number + 1) * len(grids) // len(media.pictures)) - 1]
        drawn.append(draw_overlay(picture, position, kept, seen=seen_box(picture, image_processor)))
        counts.append(count_of(position, kept))
    return drawn, counts


def count_of(position: Tensor, kept: Tensor) -> str:
    """`20 of 144`, newlines left out."""
    cells = position[:, 0] >= 0
    return f"{int(kept[cells].sum())} of {int(cells.sum())}"
