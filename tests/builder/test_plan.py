"""What a plan says is what the build then does; what cannot fit is refused before a model is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from building import scene_shards, small_config, write_config, write_tar
from test_build_cli import call, fails

from codebook_builder.build import Build
from codebook_builder.plan import plan, weight_bytes
from codebook_builder.worker import run_locally
from codebook_schemas import UserError
from reference_vlm import CHECKPOINT

CALIBRATED = {"calibration_images": 4, "top1_prob": {"quantile": 0.8}, "influence": {"quantile": 0.8}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return scene_shards(tmp_path_factory.mktemp("planned"), shards=2, images=2)


def test_a_plan_of_all_images_is_what_the_build_does(shards: str, tmp_path: Path) -> None:
    config = small_config(shards, tmp_path / "book", thresholds=CALIBRATED, selection={"min_images": 0}, cluster={"workers": 5})
    planned = plan(config, images=4)
    assert list(tmp_path.iterdir()) == []
    report = Build(config, lambda tasks: run_locally(tasks, 1), quiet=True).codebook()
    assert (planned.images, planned.calibration_images, planned.measured_images, planned.workers) == (4, 4, 4, 2)
    assert planned.experiments == report.work["asked"] == 2 * 4 * 12 * 3
    assert planned.skip_rate == report.work["skip_rate"] > 0
    chat = 2 * 2  # the chat prefix, once for calibration and once for probing
    # Which images share a batch decides where its runs begin: the plan takes all four at once, a shard has two.
    assert planned.decoder_tokens == pytest.approx(report.work["tokens"] - chat, rel=1e-2)
    assert planned.flops == pytest.approx(report.work["flops"], rel=1e-2)
    assert planned.seconds > 0
    assert 100e6 < planned.worker_bytes < 20e9


def test_the_command(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(
        small_config(shards, tmp_path / "book", thresholds={"top1_prob": 0.5, "influence": 0.1}), tmp_path / "c"
    )
    code, out, err = call(capsys, monkeypatch, "plan", config, "--images", 1, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["images"], found["calibration_images"], found["measured_images"], found["experiments"]) == (4, 0, 1, 144)
    code, out, _ = call(capsys, monkeypatch, "plan", config, "--images", 1)
    assert code == 0
    assert "144, " in out
    assert "of them skipped by the cascade" in out


def fake_model(folder: Path, parameters: int) -> Path:
    """A folder that says it holds so many weights."""
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "F16", "shape": [parameters, 1], "data_offsets": [0, 2 * parameters]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def test_weights_that_cannot_fit_are_refused_unread(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fake_model(tmp_path / "huge", 10**13)
    config = small_config(shards, tmp_path / "book", model=str(model), probe={"dtype": "bfloat16"}, cluster={"workers": 2})
    assert weight_bytes(config) == 2 * 10**13
    fails(
        call(capsys, monkeypatch, "plan", write_config(config, tmp_path / "c")), "the weights of 2 worker(s) need 37252.90 GiB"
    )
    assert not (tmp_path / "book.run").exists()


def test_weights_of_the_reference_model() -> None:
    size = (CHECKPOINT / "model.safetensors").stat().st_size  # half precision on disk, float32 when probing
    assert weight_bytes(small_config("unused.tar", Path("unused"))) == pytest.approx(2 * size, rel=0.02)


def test_no_readable_image(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("0.png", b"no image")])
    with pytest.raises(UserError, match="none of the images can be read"):
        plan(small_config(str(shard), tmp_path / "book"))
