"""Frames of real video files against a decoder that reads all of them; files that are none; the command on them."""

from __future__ import annotations

import json
import socket
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from families import VIDEO, llava_next_video
from PIL import Image
from transformers import BatchFeature
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from codebook_prune import RandomPruner, UniformPruner, UserError
from codebook_prune.answer import Asker
from codebook_prune.cli import main
from codebook_prune.media import Media, open_media
from codebook_prune.video import Sampling, read_frames, video_bytes
from reference_vlm import CHECKPOINT
from reference_vlm.scenes import make_scene, render

logging.disable_progress_bar()  # the command does it through the environment, before transformers is imported
ASK = ["--model", str(CHECKPOINT), "--prompt", "How many objects are there?", "--max-new-tokens", "2", "--device", "cpu"]


def shade(number: int) -> Image.Image:
    """Frame `number` of a test video: told from its neighbours by its grey."""
    return Image.new("RGB", (48, 32), ((number * 37) % 256,) * 3)


def write_video(path: Path, seconds: int = 3, fps: int = 10, codec: str = "libx264", form: str = "mp4") -> Path:
    """A video with few key frames."""
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, "yuv420p", 25
        for number in range(seconds * fps):
            container.mux(stream.encode(av.VideoFrame.from_image(shade(number))))
        container.mux(stream.encode(None))
    return path


def every_frame(path: Path) -> list[tuple[float, np.ndarray[Any, Any]]]:
    """All frames with their times, from the first to the last."""
    with av.open(str(path)) as container:
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [(time - frames[0][0], pixels) for time, pixels in frames]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("videos")
    write_video(place / "long.mp4", 14)
    for name, form, codec in (("a.mkv", "matroska", "libx264"), ("a.avi", "avi", "mpeg4"), ("a.webm", "webm", "libvpx")):
        write_video(place / name, codec=codec, form=form)
    write_video(place / "a.ts", form="mpegts")
    return place


@pytest.mark.parametrize("name", ["long.mp4", "a.mkv", "a.avi", "a.ts", "a.webm"])
def test_frames_are_those_on_screen_at_the_wanted_times(folder: Path, name: str) -> None:
    known = every_frame(folder / name)
    length = known[-1][0] + 0.1
    wanted = {
        Sampling(frames=3): [length * part for part in (1 / 6, 3 / 6, 5 / 6)],
        Sampling(fps=2): [i / 2 for i in range(round(length * 2))],
        Sampling(frames=200): [(i + 0.5) * length / 200 for i in range(200)],
    }
    for sampling, times in wanted.items():
        images, seconds = read_frames(folder / name, sampling)
        shown = sorted({max(i for i, (time, _) in enumerate(known) if time <= wish + 1e-6) for wish in times})
        assert np.allclose(seconds, [known[i][0] for i in shown], atol=1e-6)
        for image, i in zip(images, shown, strict=True):
            assert np.array_equal(np.asarray(image), known[i][1])


def test_turned_videos_are_upright(tmp_path: Path) -> None:
    half = Image.new("RGB", (48, 32), "blue")
    half.paste("red", (0, 0, 24, 32))
    data = bytearray(video_bytes([half] * 4, 4.0))
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # shown turned clockwise
    (tmp_path / "phone.mp4").write_bytes(data)
    (image,), _ = read_frames(tmp_path / "phone.mp4", Sampling(frames=1))
    pixels = np.asarray(image).astype(int)
    assert image.size == (32, 48)
    assert [int(pixels[5, :, 0].min()) > 200, int(pixels[-5, :, 2].min()) > 200] == [True, True]


def test_files_that_are_no_videos_are_one_line_and_open_nothing_else(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "long.mp4").read_bytes()
    matroska = (folder / "a.mkv").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x.ts"
        files = {
            "none.mp4": (None, "does not exist"),
            "text.mp4": (b"hello", "is not a video, or is damaged or cut short"),
            "empty.mp4": (b"", "is not a video, or is damaged or cut short"),
            "cut.mp4": (whole[: len(whole) // 2], "is not a video, or is damaged or cut short"),
            "cut.mkv": (matroska[: len(matroska) * 6 // 10], r"is cut short: it ends after \d\.\d of its 3\.0 s"),
            "list.m3u8": (f"#EXTM3U\n#EXTINF:9,\n{address}\n#EXT-X-ENDLIST\n".encode(), "is not a video"),
            "list.mp4": (f"ffconcat version 1.0\nfile '{folder / 'long.mp4'}'\n".encode(), "is not a video"),
            "picture.mp4": (None, "is not a regular file"),
        }
        (tmp_path / "picture.mp4").mkdir()
        for name, (content, message) in files.items():
            if content is not None:
                (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=message) as error:
                read_frames(tmp_path / name, Sampling(frames=2))
            assert "\n" not in str(error.value)
        for name in (address, f"concat:{folder / 'long.mp4'}"):
            with pytest.raises(UserError, match="does not exist"):
                read_frames(Path(name), Sampling(frames=2))
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("name", ["long.mp4", "a.mkv", "a.avi", "a.ts"])
def test_damage_is_one_line_or_frames(folder: Path, tmp_path: Path, name: str) -> None:
    data, draw = (folder / name).read_bytes(), np.random.default_rng(0)
    for _ in range(25):
        damaged = bytearray(data)
        for place in draw.integers(0, len(data), 1 + int(draw.integers(40))):
            damaged[place] = draw.integers(256)
        (tmp_path / name).write_bytes(damaged[: len(data) - int(draw.integers(2) * draw.integers(len(data)))])
        try:
            images, seconds = read_frames(tmp_path / name, Sampling(frames=3))
        except UserError as error:
            refused = str(error)
            assert "\n" not in refused
        else:
            assert 1 <= len(images) == len(seconds) <= 3


def test_a_file_of_sound_is_none(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="holds no video, only audio"):
        read_frames(tmp_path / "a.mp4", Sampling(frames=2))


def test_sizes_are_limited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {
        "MAX_BYTES": (9, "bytes, the limit is 9"),
        "MAX_SECONDS": (2, "lasts 14 s, the limits are 0 and 2"),
        "MAX_PIXELS": (9, "48 x 32 pixels, the limit is 9"),
        "MAX_PIXELS_IN_ALL": (9, "3 frames of 1536 pixels are too many"),
    }
    for name, (value, message) in limits.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"codebook_prune.video.{name}", value)
            with pytest.raises(UserError, match=message):
                read_frames(folder / "long.mp4", Sampling(frames=3))
    with pytest.raises(UserError, match="14 s at 100 frames a second are 1400 frames, the limit is 512"):
        read_frames(folder / "long.mp4", Sampling(fps=100))
    for fields in ({}, {"frames": 0}, {"frames": 513}, {"fps": 0.0}, {"fps": float("nan")}, {"frames": 2, "fps": 1.0}):
        with pytest.raises(UserError):
            Sampling(**fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 4 drawn scenes, half a second each."""
    place = tmp_path_factory.mktemp("scenes")
    pictures = [render(make_scene("test", i)) for i in range(4)]
    (place / "scenes.mp4").write_bytes(video_bytes([p for p in pictures for _ in range(5)], 10))
    (place / "bad.mp4").write_text("no video")
    return place


def test_the_command_prunes_frames_given_as_images(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: tuple[Any, Any]
) -> None:
    words = ["video", str(scenes / "scenes.mp4"), *ASK, "--frames", "4", "--pruner", "uniform", "--keep-tokens", "36"]
    with pytest.raises(SystemExit) as done:
        main([*words, "--compare", "--overlay", str(tmp_path / "sheet.png"), "--json"])
    assert done.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens_before"], found["tokens_after"], found["frames"]) == (4 * 144, 4 * 36, [0.2, 0.7, 1.2, 1.7])
    model, processor = reference
    frames = open_media(scenes / "scenes.mp4", Sampling(frames=4)).pictures
    text = "USER: " + "<image>\n" * 4 + "How many objects are there? ASSISTANT:"
    inputs = processor(images=frames, text=text, return_tensors="pt")
    for pruner, answer in ((UniformPruner(keep_tokens=36), found["answer"]), (None, found["unpruned"]["answer"])):
        if pruner is None:
            out = model.generate(**inputs, do_sample=False, max_new_tokens=2)
        else:
            with pruner(model):
                out = model.generate(**inputs, do_sample=False, max_new_tokens=2)
        assert answer == processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    page = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    assert page.shape[1] == 2 * 480 + 8  # two frames a row
    for row, top in enumerate((0, page.shape[0] // 2)):
        for column in range(2):
            cell = page[top : top + 480, 488 * column : 488 * column + 480]
            grey = np.ptp(cell, axis=2).reshape(12, 40, 12, 40)[:, 5:-5, :, 5:-5].max((1, 3)) < 12
            assert int(grey.sum()) >= 108, (row, column)  # the dropped ones are grey; a kept one may be of a grey background


def test_the_command_writes_a_video_past_a_bad_file(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["video", str(scenes), *ASK, "--fps", "2", "--pruner", "random", "--keep-ratio", "0.25"]
    with pytest.raises(SystemExit) as done:
        main([*words, "--overlay", str(tmp_path / "kept.mp4"), "--json"])
    out, err = capsys.readouterr()
    assert done.value.code == 1
    lines = [json.loads(line) for line in out.splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["bad.mp4", "scenes.mp4"]
    assert "error" in lines[0]
    assert lines[1]["overlay"] == str(tmp_path / "kept-scenes.mp4")
    assert "1 of 2 files could not be used" in err
    with av.open(lines[1]["overlay"]) as container:
        assert container.streams.video[0].average_rate == 2
        assert len([frame for frame in container.decode(video=0) if (frame.width, frame.height) == (480, 480)]) == 4


def test_compare_takes_a_video(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(scenes / "scenes.mp4"), *ASK, "--frames", "2", "--pruner", "uniform(keep_tokens=9)"]
    with pytest.raises(SystemExit) as done:
        main([*words, "--overlay", str(tmp_path / "all.png"), "--json"])
    assert done.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["tokens_before"], r["tokens_after"]) for r in found["results"]] == [(288, 288), (288, 18)]
    assert Image.open(tmp_path / "all.png").width == 2 * 480 + 8


def test_bad_video_commands_are_one_line(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film, budget = str(scenes / "scenes.mp4"), ["--pruner", "uniform", "--keep-tokens", "9"]
    picture = tmp_path / "a.png"
    render(make_scene("test", 0)).save(picture)
    for words, message in (
        (["video", film, *ASK, *budget, "--frames", "2", "--fps", "1"], "give either frames or fps"),
        (["video", film, *ASK, *budget, "--frames", "0"], "frames must be between 1 and 512"),
        (["video", str(tmp_path / "none.mp4"), *ASK, *budget], "none.mp4 does not exist"),
        (["video", film, *ASK, "--keep-tokens", "9"], "the pruner codebook_diversity needs a codebook"),
        (["video", film, *ASK, "--threshold", "0.5"], "the pruner codebook needs a codebook"),
        (["video", str(picture), *ASK, *budget], "a.png is an image: use codebook-prune image"),
        (["image", film, *ASK, *budget], "scenes.mp4 is a video: use codebook-prune video"),
        (["video", str(tmp_path), *ASK, *budget], "holds no file that ends in .asf, "),
        (["video", film, *ASK, *budget, "--overlay", str(tmp_path / "a.gif")], "ends in .mp4, .png, .jpg, .jpeg or .webp"),
        (["video", film, *ASK, *budget, "--frames", "20", "--max-new-tokens", "4000"], "give fewer frames"),
        (["compare", film, *ASK, *budget, "--overlay", str(tmp_path / "a.mp4")], "ends in .png, "),
        (["compare", str(picture), *ASK, *budget, "--fps", "1"], "is no video: leave out --frames and --fps"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1), err
        assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


class Processor:
    """Stands in for a processor of videos: those of transformers need torchvision, which this project does without."""

    video_token, image_token = "<video>", "<image>"
    video_processor = image_processor = object()

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        return " ".join(part["type"] for part in messages[0]["content"])

    def __call__(self, text: list[str], videos: list[list[Image.Image]], **_: Any) -> BatchFeature:
        assert text == ["video text"]
        frames = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) / 255.0 for frame in videos[0]])
        ids = torch.tensor([[1, 5, 6, *[VIDEO] * (len(frames) * 4), 7, 8]])
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": frames[None]})

    def decode(self, ids: torch.Tensor, **_: Any) -> str:
        return str(ids.tolist())


class FramesAsImages(Processor):
    """A processor of videos whose model takes every frame as an image, as InternVL's and SmolVLM's do."""

    image_token = "<image>"

    def __init__(self, real: Any) -> None:
        self.real, self.given = real, dict[str, Any]()

    def __call__(self, text: list[str], videos: list[list[Image.Image]], **given: Any) -> BatchFeature:
        self.given = given
        frames = "".join("<image>\n" for _ in videos[0])
        return self.real(text=[f"USER: {frames}what? ASSISTANT:"], images=videos[0], return_tensors="pt")

    def decode(self, ids: torch.Tensor, **_: Any) -> str:
        return str(self.real.decode(ids))


@pytest.mark.parametrize("sampling", [Sampling(frames=4), Sampling(fps=2), Sampling(frames=1)])
def test_frames_taken_as_images_keep_so_many_each_and_processors_learn_their_times(
    folder: Path, sampling: Sampling, reference: tuple[Any, Any]
) -> None:
    processor, media = FramesAsImages(reference[1]), open_media(folder / "a.mkv", sampling)
    (run,) = Asker(reference[0], processor, "what?", 2).ask(media, [UniformPruner(keep_tokens=7)])
    assert [int(kept.sum()) for kept in run.kept] == [7] * len(media.pictures)
    assert processor.given["do_sample_frames"] is False
    told = VideoMetadata(**processor.given["video_metadata"][0])
    assert np.allclose(told.timestamps, media.seconds, atol=1e-3)
    assert told.sampled_fps == pytest.approx({4: 4 / 3, 6: 2.0, 1: 0.66}[len(media.pictures)], rel=0.08)


def test_a_model_with_a_place_for_videos_is_given_one() -> None:
    asker = Asker(llava_next_video("sdpa").model, Processor(), "what?", 2)
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)) for i in range(5)]
    media = Media((Path("a.mp4"),), frames, (0.0, 1.0, 2.0, 3.0, 4.0))
    plain, whole, few = asker.ask(
        media, [None, UniformPruner(keep_ratio=1.0), RandomPruner(keep_tokens=2) | UniformPruner(keep_tokens=1)]
    )
    assert [run.tokens for run in (plain, whole, few)] == ["20", "20 of 20", "5 of 20"]
    assert whole.answer == plain.answer
    kept, frame = few.kept[0], few.frame[0]
    assert [int(kept[frame == number].sum()) for number in range(5)] == [1] * 5
