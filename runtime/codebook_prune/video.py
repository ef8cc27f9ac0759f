"""Reading frames of video files that may be anything, and writing small videos: the one module that imports PyAV (`video`)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from codebook_prune.images import MAX_PIXELS
from codebook_schemas import UserError

MAX_BYTES = 8 << 30
MAX_SECONDS = 6 * 3600
MAX_FRAMES = 512
MAX_PIXELS_IN_ALL = 1 << 30
"""Of all frames that are looked at together (3 GB as RGB)."""
SEEK_SECONDS = 4.0
"""Gaps between wanted frames from which on the file is searched for a key frame instead of decoded through."""
SLACK_SECONDS = 0.5
"""How much earlier than announced a video may end."""
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
"""Demuxers that open nothing but the file itself: no playlists, no concat, no image sequences, no devices."""


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are looked at: `frames` spread evenly over it, or `fps` of every second, from its start.

    Raises:
        UserError: both or none given, or out of range.
    """

    frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if (self.frames is None) == (self.fps is None):
            raise UserError("give either frames or fps")
        if self.frames is not None and not 1 <= self.frames <= MAX_FRAMES:
            raise UserError(f"frames must be between 1 and {MAX_FRAMES}, not {self.frames}")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise UserError(f"fps must be a positive number, at most 1000, not {self.fps}")

    def times(self, seconds: float) -> list[float]:
        """Seconds from the start at which a video of this length is looked at.

        `frames`: the middles of as many equal parts. `fps`: 0, 1 / fps, 2 / fps, ...

        Raises:
            UserError: more than `MAX_FRAMES`.
        """
        if self.frames is not None:
            return [(i + 0.5) * seconds / self.frames for i in range(self.frames)]
        step = 1 / (self.fps or 1)
        count = max(1, int(seconds / step - 1e-9) + 1)
        if count > MAX_FRAMES:
            raise UserError(f"{seconds:.0f} s at {self.fps:g} frames a second are {count} frames, the limit is {MAX_FRAMES}")
        return [i * step for i in range(count)]


def import_av() -> Any:
    """PyAV, or a UserError that names the extra to install."""
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV: pip install 'codebook-prune[video]'") from None
    return av


def read_frames(path: Path, sampling: Sampling) -> tuple[list[Image.Image], list[float]]:
    """(frames, upright RGB; the second each is shown at): at every wanted time the frame that is on screen then, each once.

    The file is opened here and handed over as bytes, so nothing in it can make the library open a network address or another
    file; only plain container formats are accepted, and sizes are checked before anything is decoded.

    Raises:
        UserError: no such file, not a video, damaged, cut short, or larger than the limits above; PyAV is not installed.
    """
    av = import_av()
    if not path.is_file():
        raise UserError(f"video {path} {'is not a regular file' if path.exists() else 'does not exist'}")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"video {path} has {path.stat().st_size} bytes, the limit is {MAX_BYTES}")
    try:
        with path.open("rb") as file, _opened(av, file) as container:
            stream = _stream(container, path)
            times = sampling.times(_seconds(container, stream, path))
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels * len(times) > MAX_PIXELS_IN_ALL:
                raise UserError(f"video {path}: {len(times)} frames of {pixels} pixels are too many: give fewer frames")
            return _frames_at(container, stream, times, path)
    except PermissionError:
        raise UserError(f"video {path} cannot be read: permission denied") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file brings about almost anything
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path} is not a video, or is damaged or cut short: {reason}") from None


def _opened(av: Any, file: BinaryIO) -> Any:
    options = {"format_whitelist": FORMATS, "protocol_whitelist": ""}
    return av.open(file, mode="r", options=options, metadata_errors="replace")


def _stream(container: Any, path: Path) -> Any:
    """The first moving picture in the file, its decoder limited to `MAX_PIXELS`."""
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
        raise UserError(f"{path} holds no video, only {', '.join(sorted({s.type for s in container.streams})) or 'nothing'}")
    context = streams[0].codec_context
    if context is None:
        raise UserError(f"{path}: its video is in a format that this PyAV cannot decode")
    if context.width * context.height > MAX_PIXELS:
        raise UserError(f"video {path} has {context.width} x {context.height} pixels, the limit is {MAX_PIXELS} in all")
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return streams[0]


def _seconds(container: Any, stream: Any, path: Path) -> float:
    """Length of the video: as its track says, or, where it does not, up to the end of its last packet."""
    if stream.duration:
        seconds = float(stream.duration * stream.time_base)
    else:
        ends = dict.fromkeys(("video", "audio"), 0.0)
        for packet in container.demux():
            if packet.pts is not None and packet.stream.type in ends:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                ends[packet.stream.type] = max(ends[packet.stream.type], end)
        _check_whole(path, max(ends.values()), (container.duration or 0) / 1e6)
        seconds = ends["video"] - float((stream.start_time or 0) * stream.time_base)
        container.seek(0)
    if not 0 < seconds <= MAX_SECONDS:
        raise UserError(f"video {path} lasts {seconds:.0f} s, the limits are 0 and {MAX_SECONDS}")
    return seconds


def _check_whole(path: Path, end: float, announced: float) -> None:
    if announced - end > SLACK_SECONDS:
        raise UserError(f"video {path} is cut short: it ends after {end:.1f} of its {announced:.1f} s")


def _frames_at(container: Any, stream: Any, times: Sequence[float], path: Path) -> tuple[list[Image.Image], list[float]]:
    """The frames on screen at rising `times`, each once: the last one not shown later than the time, or the first of all."""
    start = float((stream.start_time or 0) * stream.time_base)
    frames: list[Image.Image] = []
    seconds: list[float] = []
    decoded: Iterator[Any] = container.decode(stream)
    now, ahead = next(decoded, None), None
    if now is None:
        raise UserError(f"video {path} is damaged or cut short: it holds no frame")
    for time in times:
        if time + start - _shown(now, path) > SEEK_SECONDS:
            container.seek(int((time + start) / stream.time_base), stream=stream)
            decoded = container.decode(stream)
            sought = next(decoded, None)
            if sought is not None and _shown(now, path) < _shown(sought, path) <= time + start:
                now, ahead = sought, None
        ahead = ahead or next(decoded, None)
        while ahead is not None and _shown(ahead, path) <= time + start:
            now, ahead = ahead, next(decoded, None)
        if ahead is None:
            _check_whole(path, _shown(now, path) - start, time)
        if not seconds or seconds[-1] < _shown(now, path) - start:
            frames.append(_upright(now, path))
            seconds.append(_shown(now, path) - start)
    return frames, seconds


def _shown(frame: Any, path: Path) -> float:
    if frame.time is None:
        raise UserError(f"video {path} does not say when its frames are shown")
    return float(frame.time)


def _upright(frame: Any, path: Path) -> Image.Image:
    if frame.width * frame.height > MAX_PIXELS:
        raise UserError(f"video {path} has {frame.width} x {frame.height} pixels, the limit is {MAX_PIXELS} in all")
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image


def video_bytes(pictures: Sequence[Image.Image], fps: float) -> bytes:
    """An MP4 file (H.264 where this PyAV has it) of pictures of one size, `fps` of them a second."""
    av = import_av()
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream(
            "libx264" if "libx264" in av.codecs_available else "mpeg4", rate=Fraction(fps).limit_denominator(1000)
        )
        stream.width, stream.height = (side + side % 2 for side in pictures[0].size)  # chroma has half the resolution
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            whole = Image.new("RGB", (stream.width, stream.height))
            whole.paste(picture)
            container.mux(stream.encode(av.VideoFrame.from_image(whole)))
        container.mux(stream.encode(None))
    return buffer.getvalue()
