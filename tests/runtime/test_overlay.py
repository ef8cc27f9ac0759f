"""The picture shows exactly the cells that were kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image
from transformers import CLIPImageProcessorPil

from codebook_prune import UserError
from codebook_prune.answer import Run
from codebook_prune.drawing import before_and_after, kept_pictures
from codebook_prune.media import Media
from codebook_prune.overlay import EDGE, GRID_LINE, check_picture_path, draw_overlay, save_picture, seen_box, sheet

GRID = torch.tensor([[r, c] for r in range(4) for c in range(4)])
DIMMED = 58
"""What (250, 80, 30) fades to."""


@pytest.mark.parametrize("size", [(32, 32), (30, 61), (700, 500), (1001, 333)])
def test_kept_cells_keep_their_pixels_and_dropped_ones_are_grey(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (250, 80, 30))
    kept = torch.zeros(16, dtype=torch.bool)
    kept[[0, 6, 15]] = True
    picture = np.asarray(draw_overlay(image, GRID, kept)).astype(int)
    assert max(picture.shape[:2]) >= 480
    height, width = picture.shape[:2]
    for i in range(16):
        row, column = divmod(i, 4)
        margin = 1 if kept[i] else 6  # lines are drawn on dropped cells
        band = picture[height * row // 4 + margin : height * (row + 1) // 4 - margin]
        cell = band[:, width * column // 4 + margin : width * (column + 1) // 4 - margin]
        assert np.unique(cell.reshape(-1, 3), axis=0).tolist() == [[250, 80, 30] if kept[i] else [DIMMED] * 3]
    found = {tuple(p) for p in picture.reshape(-1, 3).tolist()}
    assert found == {(250, 80, 30), (DIMMED,) * 3, EDGE, GRID_LINE}  # hard edges, nothing in between


def test_small_cells_have_no_lines_between_them() -> None:
    places = torch.cartesian_prod(torch.arange(60), torch.arange(60))
    picture = np.asarray(draw_overlay(Image.new("RGB", (480, 480)), places, torch.zeros(3600, dtype=torch.bool)))
    assert np.ptp(picture) == 0


def test_newlines_have_no_place_in_the_picture() -> None:
    image, kept = noise_image(0), torch.ones(17, dtype=torch.bool)
    kept[5] = False
    places = torch.cat([torch.tensor([[-1, -1]]), GRID])
    plain = draw_overlay(image, GRID, kept[1:])
    assert np.array_equal(np.asarray(draw_overlay(image, places, kept)), np.asarray(plain))


def test_the_grid_lies_where_the_processor_crops() -> None:
    crop = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = noise_image(1, (600, 300))
    assert seen_box(image, crop) == (150, 0, 450, 300)
    raw = crop(image, return_tensors="np", do_normalize=False, do_rescale=False)["pixel_values"][0]
    shown = np.asarray(raw).transpose(1, 2, 0)
    by_hand = np.asarray(image.crop((150, 0, 450, 300)).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(shown.astype(int) - by_hand)[:, 2:-2].max() <= 1  # at the cut, the resize saw what lies beyond
    picture = np.asarray(draw_overlay(image, GRID, torch.ones(16, dtype=torch.bool), seen=seen_box(image, crop)))
    assert np.array_equal(picture[:, 150:450], np.asarray(image)[:, 150:450])
    for outside in (picture[:, :150], picture[:, 450:]):
        assert np.ptp(outside, axis=2).max() == 0
    assert seen_box(image, SimpleNamespace(size={"height": 32, "width": 32}, do_center_crop=False)) is None
    assert seen_box(image, SimpleNamespace(**vars(crop), image_grid_pinpoints=[[32, 64]])) is None  # any resolution


def test_pictures_stand_side_by_side_with_captions() -> None:
    pair = [Image.new("RGB", (100, 50), "red"), Image.new("RGB", (40, 100), "blue")]
    page = sheet(pair, ["one", "two"], 2)
    assert page.width == 200 + 8 + 40
    assert page.height > 100
    assert page.getpixel((50, 50)) == (255, 0, 0)
    assert page.getpixel((230, 50)) == (0, 0, 255)
    assert np.asarray(page)[100:].min() < 128  # the captions are written
    blank = np.asarray(sheet(pair, ["", ""], 2))[100:]
    assert blank.min() == 255


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_pictures_are_written_whole(tmp_path: Path, name: str) -> None:
    save_picture(noise_image(0), tmp_path / name)
    assert Image.open(tmp_path / name).size == (32, 32)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_impossible_places_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    bad = {"a.txt": "ends in", "a": "ends in", "no/a.png": "does not exist", "folder.png": "is a folder"}
    for name, message in bad.items():
        with pytest.raises(UserError, match=message):
            check_picture_path(tmp_path / name)
    with pytest.raises(UserError, match="cannot write"):
        save_picture(noise_image(0), tmp_path / "folder.png")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_of_several_crops_the_last_is_drawn_and_joined_frames_share_theirs() -> None:
    """An overview of 2 x 2 of which all is kept, then a finer grid of 4 x 4 of which nothing is: nothing is kept to be seen."""
    picture = noise_image(2, (480, 480))
    place = torch.cat([torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]), GRID, torch.tensor([[-1, -1]])])
    frame = torch.tensor([0] * 4 + [1] * 17)
    run = Run("", 20, 4, 4, 4.0, 0.0, 0.0, 0.0, kept=[frame == 0], position=[place], frame=[frame])
    drawn, counts = kept_pictures(Media((Path("a.png"),), [picture]), run, SimpleNamespace())
    assert counts == ["0 of 16"]
    assert before_and_after(run, counts) == ["20 tokens", "4 tokens kept"]  # of both crops
    assert before_and_after(run, ["3 of 9", "5 of 16"]) == ["9 tokens", "3 tokens kept", "16 tokens", "5 tokens kept"]
    assert np.ptp(np.asarray(drawn[0]), axis=2).max() == 0
    two = Media((Path("a.mp4"),), [picture] * 4, seconds=(0.0, 1.0, 2.0, 3.0))
    assert kept_pictures(two, run, SimpleNamespace())[1] == ["4 of 4", "4 of 4", "0 of 16", "0 of 16"]
