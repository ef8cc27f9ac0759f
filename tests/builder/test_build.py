"""Whole builds: the same codebook whether in one go, interrupted, killed, local or distributed; and what stops a build."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from building import image_scores, png, scene_shards, small_config, write_config, write_tar
from processes import descendants, end

from codebook_builder import worker
from codebook_builder.artefact import digest, published, verify
from codebook_builder.build import Build, QuarantinedError, Report
from codebook_builder.publish import reselect
from codebook_builder.run import RunFolder
from codebook_builder.shards import scan
from codebook_builder.tasks import Outcome, ShardResult, ShardTask
from codebook_builder.worker import run_locally
from codebook_prune.codebook import Codebook
from codebook_schemas import BuildConfig, CodebookManifest, UserError
from codebook_schemas.files import sha256_of
from reference_vlm import CHECKPOINT

LOCAL = partial(run_locally, attempts=2)


def build(config: BuildConfig, **options: Any) -> Report:
    return Build(config, LOCAL, quiet=True, **options).codebook()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return scene_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: str) -> tuple[BuildConfig, Report]:
    """An uninterrupted local build: what every other way must reproduce."""
    config = small_config(inputs, tmp_path_factory.mktemp("whole") / "book")
    return config, build(config)


def test_a_build_is_complete_and_says_what_it_did(whole: tuple[BuildConfig, Report], reference: tuple[Any, Any]) -> None:
    config, report = whole
    manifest = verify(Path(config.output))
    assert report.prototypes == manifest.rows == manifest.counts["prototypes"] > 0
    assert (manifest.counts["images"], manifest.counts["tokens"], report.skipped) == (12, 144, 0)
    assert manifest.config == published(config)
    # Calibration asks for all experiments of five images, the build of all twelve; what is skipped is not computed.
    assert report.work["asked"] == 3 * 12 * (5 + 12)
    assert 0 < report.work["skipped"] < 2 * 12 * 12
    assert report.work["flops"] > report.work["tokens"] * 2e6
    assert 0 < report.work["mfu"] < 1.5
    assert manifest.quality.index_recall == 1.0
    from codebook_prune.adapters.loading import adapter_for

    Codebook.from_pretrained(config.output).check_model(adapter_for(reference[0]))
    assert build(config).digest == report.digest == digest(Path(config.output))


def test_a_build_stopped_anywhere_resumes_to_the_same_codebook(
    tmp_path: Path, inputs: str, whole: tuple[BuildConfig, Report]
) -> None:
    config = small_config(inputs, tmp_path / "book")
    handed: list[str] = []

    def one_then_stop(tasks: Sequence[ShardTask]) -> Iterator[Outcome]:
        handed.extend(task.shard.name for task in tasks)
        yield from LOCAL(tasks[-1:])  # the last first: order must not matter
        if len(tasks) > 1:
            raise KeyboardInterrupt

    job = Build(config, one_then_stop, quiet=True)
    for _ in range(3):  # calibration: 2 shards, then 1; probing: 3, then 2, then 1
        with pytest.raises(KeyboardInterrupt):
            job.codebook()
        assert not (tmp_path / "book").exists()
    job.codebook()
    assert len(handed) == 2 + 1 + 3 + 2 + 1
    assert digest(tmp_path / "book") == whole[1].digest


def test_scanned_manifests_and_other_worker_settings_give_the_same(
    tmp_path: Path, inputs: str, whole: tuple[BuildConfig, Report]
) -> None:
    scan([inputs]).write(tmp_path / "inputs.json")
    config = small_config(str(tmp_path / "inputs.json"), tmp_path / "book", cluster={"workers": 3, "in_flight": 1})
    assert build(config).digest == whole[1].digest


def test_bad_images_are_left_out_listed_and_limited(tmp_path: Path) -> None:
    members = [(f"{i}.png", png(i, 96)) for i in range(6)]
    members[2] = ("2.png", b"not an image")
    shard = write_tar(tmp_path / "a.tar", members)
    strict = small_config(str(shard), tmp_path / "book")
    with pytest.raises(UserError, match=r"1 images cannot be used.* allows 5% of 6: 00000-a.tar 2: cannot decode"):
        build(strict)
    listed = json.loads((RunFolder.of(strict.output).path / "skipped.json").read_text())
    assert [(row["shard"], row["key"]) for row in listed] == [("00000-a.tar", "2")]
    report = build(small_config(str(shard), tmp_path / "book", cluster={"max_bad_fraction": 0.5}))
    assert (report.skipped, report.counts["images"]) == (1, 5)


def test_an_image_the_processor_refuses_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_tar(tmp_path / "a.tar", [*((f"{i}.png", png(i, 96)) for i in range(5)), ("odd.png", png(9, 40))])
    _, processor = worker.load_once(str(CHECKPOINT), None, "float32", "cpu")
    template = processor.apply_chat_template

    def apply(chat: Any, **options: Any) -> Any:
        if chat[0]["content"][0]["image"].size == (40, 40):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return template(chat, **options)

    monkeypatch.setattr(processor, "apply_chat_template", apply)
    config = small_config(str(shard), tmp_path / "book", cluster={"max_bad_fraction": 0.5})
    report = build(config)
    assert (report.skipped, report.counts["images"]) == (1, 5)
    assert "refuses 40 x 40 pixels" in (RunFolder.of(config.output).path / "skipped.json").read_text()


def test_inputs_that_changed_are_refused(tmp_path: Path) -> None:
    pattern = scene_shards(tmp_path, shards=2, images=2)
    config = small_config(pattern, tmp_path / "book")
    folder = RunFolder.of(config.output)
    folder.inputs(config.shards)
    shard = tmp_path / "s-001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"not the file that was scanned"):
        build(config)
    shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(UserError, match=r"other shards"):
        build(config)
    assert not (tmp_path / "book").exists()


def test_another_configuration_is_never_mixed_in(inputs: str, whole: tuple[BuildConfig, Report], tmp_path: Path) -> None:
    config, _ = whole
    with pytest.raises(UserError, match=r"already holds a codebook of another build"):
        build(config.model_copy(update={"seed": 1}))
    small = small_config(inputs, tmp_path / "book")
    shutil.copytree(RunFolder.of(config.output).path, RunFolder.of(small.output).path)
    other = small.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match=rf"{small.probe_hash}, this one is {other.probe_hash} .differs in: seed"):
        build(other)


def test_zero_prototypes_leave_no_codebook(inputs: str, tmp_path: Path) -> None:
    config = small_config(inputs, tmp_path / "book", selection={"min_images": 50})
    with pytest.raises(UserError, match=r"no prototypes selected: 144 tokens of 12 images"):
        build(config)
    assert not (tmp_path / "book").exists()
    assert not list(tmp_path.glob(".book*"))


def test_selecting_again_equals_building_anew(inputs: str, tmp_path: Path) -> None:
    everything = {"tokens_per_image": 12, "cascade": False}
    config = small_config(inputs, tmp_path / "book", probe=everything)
    build(config)
    changes = {
        "thresholds": {"calibration_images": 5, "top1_prob": {"quantile": 0.9}, "influence": {"quantile": 0.9}},
        "selection": {"min_images": 2, "inter_clusters": 3, "intra_clusters": 4, "prototypes": "centroids"},
    }
    reselect(small_config(inputs, tmp_path / "book", probe=everything, **changes), tmp_path / "again")
    cascade = small_config(inputs, tmp_path / "anew", **changes)
    build(cascade)
    for name in ("prototypes.safetensors", "prototypes.parquet", "index/shard-00000.faiss"):
        assert sha256_of(tmp_path / "again" / name) == sha256_of(tmp_path / "anew" / name)


def test_selecting_again_needs_the_scores_it_asks_for(inputs: str, whole: tuple[BuildConfig, Report], tmp_path: Path) -> None:
    config, report = whole
    high = {"calibration_images": 5, "top1_prob": {"quantile": 0.95}, "influence": {"quantile": 0.8}}
    with pytest.raises(UserError, match=r"above the .* cascade probed with.*cascade: false"):
        reselect(small_config(inputs, Path(config.output), thresholds=high), tmp_path / "a")
    with pytest.raises(UserError, match=r"only thresholds and selection"):
        reselect(config.model_copy(update={"seed": 1}), tmp_path / "a")
    with pytest.raises(UserError, match=r"holds no scores"):
        reselect(small_config(inputs, tmp_path / "none"), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    reselect(config, tmp_path / "b")
    assert digest(tmp_path / "b") == report.digest


def test_extending_uses_the_codebooks_thresholds(inputs: str, whole: tuple[BuildConfig, Report], tmp_path: Path) -> None:
    Codebook.from_pretrained(whole[0].output).save_pretrained(tmp_path / "book")
    before = CodebookManifest.read(tmp_path / "book")
    new = small_config(scene_shards(tmp_path / "new", first=100), tmp_path / "extension")
    report = Build(new, LOCAL, quiet=True).extend(tmp_path / "book")
    after = verify(tmp_path / "book")
    assert (after.version, after.thresholds) == (2, before.thresholds)
    assert report.prototypes == after.rows > before.rows
    assert all(after.files[name] == entry for name, entry in before.files.items())
    assert not (RunFolder.of(new.output).path / "calibration").exists()
    with pytest.raises(UserError, match=r"already built from"):
        Build(new, LOCAL, quiet=True).extend(tmp_path / "book")
    changes = {"model": before.model.model_copy(update={"fingerprint": "0" * 16}), "source": "other"}
    before.model_copy(update=changes).commit(tmp_path / "book")
    again = small_config(scene_shards(tmp_path / "other", first=200), tmp_path / "other-extension")
    with pytest.raises(UserError, match=r"was built with connector 0{16}, that of .* is \w{16}: extend it with the model"):
        Build(again, LOCAL, quiet=True).extend(tmp_path / "book")
    assert not RunFolder.of(again.output).has_scores
    scale = small_config(inputs, tmp_path / "x", probe={"divergence": "reference"})
    with pytest.raises(UserError, match=r"reference"):
        Build(scale, LOCAL, quiet=True).extend(tmp_path / "book")


def test_failures_are_retried_then_quarantined_then_forgiven(
    inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[BuildConfig, Report]
) -> None:
    config = small_config(inputs, tmp_path / "book")
    real, calls = worker.process_shard, []

    def flaky(task: ShardTask) -> ShardResult:
        calls.append((task.shard.name, task.attempt))
        if task.limit is None and task.shard.name.startswith("00001"):
            raise RuntimeError("the sample bites")
        if task.limit is None and task.shard.name.startswith("00002") and task.attempt == 0:
            raise OSError("once only")
        return real(task)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "process_shard", flaky)
        with pytest.raises(QuarantinedError, match=r"00001-s-001.tar.*--allow-quarantine"):
            build(config)
        assert calls.count(("00001-s-001.tar", 1)) == 1
        assert ("00002-s-002.tar", 1) in calls
        written = RunFolder.of(config.output).quarantine / "00001-s-001.tar.txt"
        assert "the sample bites" in written.read_text()
        without = build(small_config(inputs, tmp_path / "without"), allow_quarantine=True)
        assert without.quarantined == ("00001-s-001.tar",)
        assert without.counts["images"] == 8
    assert build(config).digest == whole[1].digest
    assert not written.exists()


def test_a_shard_of_bad_images_only_is_an_empty_part(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", [("x.png", b"no"), ("y.png", b"no")])
    write_tar(tmp_path / "a.tar", [(f"{i}.png", png(i, 96)) for i in range(6)])
    lists = str(tmp_path / "{a,b}.tar")
    report = build(small_config(lists, tmp_path / "book", cluster={"max_bad_fraction": 0.5}))
    assert (report.counts["images"], report.skipped) == (6, 2)


def test_not_a_number_is_a_bad_sample() -> None:
    scores = image_scores("k", 4, 0)
    assert scores.is_finite
    scores.embeddings[0, 0] = np.nan
    assert not scores.is_finite


def command(config: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "codebook_builder.cli", "run", str(config), "--json", *options]


def wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        assert process.poll() is None, "the build ended too early"
        time.sleep(0.1)
    raise TimeoutError


def test_sigkill_of_a_local_build_is_resumed(tmp_path: Path, inputs: str, whole: tuple[BuildConfig, Report]) -> None:
    config = small_config(inputs, tmp_path / "book")
    file = write_config(config, tmp_path / "c.json")
    parts = RunFolder.of(config.output).parts
    process = subprocess.Popen(command(file, "--local"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: list((parts / "_done").glob("*.json")), process)
    process.kill()
    process.wait()
    assert not (tmp_path / "book").exists()
    assert build(config).digest == whole[1].digest


@pytest.mark.cluster
def test_sigkill_of_a_worker_actor_is_survived(tmp_path: Path, inputs: str, whole: tuple[BuildConfig, Report]) -> None:
    config = small_config(inputs, tmp_path / "book", cluster={"workers": 2, "cpus_per_worker": 0.5})
    file = write_config(config, tmp_path / "c.json")
    folder = RunFolder.of(config.output)
    environment = os.environ | {"HOME": str(tmp_path)}
    process = subprocess.Popen(command(file), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    wait_for(lambda: list(folder.calibration.glob("part-*")), process)
    victim = next(pid for pid, name in descendants(process.pid).items() if "ray::ShardActor" in name)
    os.kill(victim, signal.SIGKILL)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    assert json.loads(out)["digest"] == whole[1].digest
    assert not folder.quarantine.exists()


@pytest.mark.cluster
def test_sigkill_of_the_driver_is_resumed(tmp_path: Path, inputs: str, whole: tuple[BuildConfig, Report]) -> None:
    config = small_config(inputs, tmp_path / "book", cluster={"workers": 2, "cpus_per_worker": 0.5})
    file = write_config(config, tmp_path / "c.json")
    folder = RunFolder.of(config.output)
    with TemporaryDirectory(prefix="k") as short:  # a killed driver cannot remove its Ray's files
        kill_driver(file, folder, os.environ | {"HOME": str(tmp_path), "TMPDIR": short})
    assert build(config).digest == whole[1].digest


def kill_driver(file: Path, folder: RunFolder, environment: dict[str, str]) -> None:
    """Start a build on an embedded Ray, kill its driver after the first committed shard and see all of it end."""
    process = subprocess.Popen(command(file), stdout=subprocess.DEVNULL, env=environment)
    try:
        wait_for(lambda: list((folder.parts / "_done").glob("*.json")), process)
    finally:
        started = descendants(process.pid)
        process.kill()
        process.wait()
        end(started, seconds=8)  # Ray's agents would end by themselves, a minute later


@pytest.mark.cluster
def test_a_gpu_that_is_not_there_is_refused_at_once(tmp_path: Path, inputs: str) -> None:
    config = small_config(inputs, tmp_path / "book", cluster={"gpus_per_worker": 64})
    file = write_config(config, tmp_path / "c.json")
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(command(file), capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 2
    assert "error: a worker needs 1 CPUs and 64 GPUs on one node" in done.stderr
    assert "Traceback" not in done.stderr
