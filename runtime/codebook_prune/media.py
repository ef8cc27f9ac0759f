"""What a question can be about: an image or the frames of a video, and the files that a command's arguments stand for."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from codebook_prune.images import open_image
from codebook_prune.video import Sampling, read_frames
from codebook_schemas import UserError

IMAGES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (".asf", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")


@dataclass(frozen=True)
class Media:
    """Images of one prompt, each from its file, or a video's frames, upright RGB; `seconds` are the frames' times, none for
    images."""

    files: tuple[Path, ...]
    pictures: list[Image.Image]
    seconds: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The file, or all of them."""
        return ", ".join(map(str, self.files))

    @property
    def is_video(self) -> bool:
        """Whether the pictures are frames of a video."""
        return bool(self.seconds)

    @property
    def metadata(self) -> dict[str, Any]:
        """When a video's frames are shown, as transformers' video processors ask for it: frames counted in milliseconds. The
        frames are taken to stand for equal parts of the video; a single one for a second."""
        first, last, number = self.seconds[0], self.seconds[-1], len(self.seconds)
        duration = number * (last - first) / (number - 1) if number > 1 else 1.0
        indices = [round(1000 * time) for time in self.seconds]
        total = max(round(1000 * duration), indices[-1] + 1)
        return {"total_num_frames": total, "fps": 1000.0, "duration": total / 1000, "frames_indices": indices}


def open_images(files: Sequence[Path]) -> Media:
    """Images for one prompt.

    Raises:
        UserError: as `open_media`.
    """
    return Media(tuple(files), [picture for file in files for picture in open_media(file, None).pictures])


def open_media(file: Path, sampling: Sampling | None) -> Media:
    """A video's frames as `sampling` says, or an image where there is none.

    Raises:
        UserError: as `read_frames` and `open_image`; or the name says that it is the other kind.
    """
    suffix = file.suffix.lower() if file.is_file() else ""
    if sampling is None:
        if suffix in VIDEOS:
            raise UserError(f"{file} is a video: use codebook-prune video")
        return Media((file,), [open_image(file)])
    if suffix in IMAGES and suffix != ".gif":  # which is both
        raise UserError(f"{file} is an image: use codebook-prune image")
    frames, seconds = read_frames(file, sampling)
    return Media((file,), frames, tuple(seconds))


def expand(arguments: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """The files that arguments stand for, in their order: a file itself, a folder's files of these kinds (also those in folders
    below), a pattern's matches. A path that is nothing is kept: whoever opens it says so.

    Raises:
        UserError: a folder or pattern without such files.
    """
    found: list[Path] = []
    for path in arguments:
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file() and not p.name.startswith(".")]
            what = f"folder {path} holds no file that ends in {', '.join(suffixes)}"
        elif not path.exists() and glob.has_magic(str(path)):
            inside = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
            what = f"no file matches {path}"
        else:
            inside, what = [path], ""
        if not inside:
            raise UserError(what)
        found += sorted(inside)
    return found


def check_some(files: Sequence[Path], sampling: Sampling | None) -> None:
    """Refuse files none of which can be used, before anything heavy is loaded; stops at the first that can.

    Raises:
        UserError: the reason, of the first where there are several.
    """
    first: UserError | None = None
    for file in files:
        try:
            open_media(file, sampling)
            return
        except UserError as error:
            first = first or error
    if first is not None:
        raise first if len(files) == 1 else UserError(f"none of the {len(files)} files can be used; the first: {first}")
