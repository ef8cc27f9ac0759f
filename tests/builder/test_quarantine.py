"""Builds without the shards that failed: what is left out is said, and nothing of it stays in a later, healthy build."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from building import png, scene_shards, small_config, write_tar

from codebook_builder import worker
from codebook_builder.build import Build, QuarantinedError, Report
from codebook_builder.publish import reselect
from codebook_builder.run import RunFolder
from codebook_builder.tasks import ShardResult, ShardTask
from codebook_builder.worker import run_locally
from codebook_prune.codebook import Codebook
from codebook_schemas import BuildConfig, CodebookManifest, UserError

LOCAL = partial(run_locally, attempts=1)
FIRST, LAST = "00000-s-000.tar", "00002-s-002.tar"
Failing = Callable[[ShardTask], bool]


def build(config: BuildConfig, **options: Any) -> Report:
    return Build(config, LOCAL, quiet=True, **options).codebook()


def source(output: str | Path) -> str:
    """What a codebook's manifest says about its inputs, without their hash."""
    return str(CodebookManifest.read(Path(output)).source).partition(" ")[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return scene_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory, inputs: str) -> str:
    """Of an uninterrupted build."""
    return build(small_config(inputs, tmp_path_factory.mktemp("whole") / "book")).digest


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[Failing]:
    """Tasks that one of these is true of fail."""
    rules: list[Failing] = []
    real = worker.process_shard

    def process(task: ShardTask) -> ShardResult:
        if any(rule(task) for rule in rules):
            raise RuntimeError("bites")
        return real(task)

    monkeypatch.setattr(worker, "process_shard", process)
    return rules


def probing(name: str) -> Failing:
    return lambda task: task.limit is None and task.shard.name == name


def calibrating(name: str) -> Failing:
    return lambda task: task.limit is not None and task.shard.name == name


def test_a_finished_build_is_reported_again_with_consent_only(tmp_path: Path, inputs: str, failing: list[Failing]) -> None:
    config = small_config(inputs, tmp_path / "book")
    failing.append(probing(LAST))
    first = build(config, allow_quarantine=True)
    assert (first.quarantined, source(config.output)) == ((LAST,), "without 1 shards")
    again = build(config, allow_quarantine=True)
    assert (again.digest, again.quarantined) == (first.digest, first.quarantined)
    with pytest.raises(UserError, match=r"incomplete build \(without 1 shards\): keep it with --allow-quarantine"):
        build(config)
    with pytest.raises(UserError, match=r"lacks the scores of 1 of 3 shards"):
        reselect(config, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert reselect(config, tmp_path / "again", allow_quarantine=True).source == CodebookManifest.read(tmp_path / "book").source


def test_a_shard_that_failed_in_calibration_only_is_in_the_codebook(
    tmp_path: Path, inputs: str, digest: str, failing: list[Failing]
) -> None:
    config = small_config(inputs, tmp_path / "book")
    failing.append(calibrating(FIRST))
    report = build(config, allow_quarantine=True)
    assert (report.quarantined, report.counts["images"]) == ((), 12)
    assert source(config.output) == "calibrated without 1 shards"
    assert report.digest != digest
    assert build(config, allow_quarantine=True).digest == report.digest
    with pytest.raises(UserError, match=r"incomplete build \(calibrated without 1 shards\)"):
        build(config)


def test_thresholds_without_a_shard_do_not_stay(tmp_path: Path, inputs: str, digest: str, failing: list[Failing]) -> None:
    """A build stopped after calibration, then a healthy one: the digest of one that never failed."""
    config = small_config(inputs, tmp_path / "book")
    failing += [calibrating(FIRST), lambda task: task.limit is None]
    with pytest.raises(UserError, match=r"no committed scores"):
        build(config, allow_quarantine=True)
    stored = RunFolder.of(config.output).stored_thresholds(config.thresholds)
    assert stored is not None
    assert stored.without == (FIRST,)
    failing.clear()
    assert build(config).digest == digest


def test_scores_by_such_thresholds_are_kept_with_consent_only(
    tmp_path: Path, inputs: str, digest: str, failing: list[Failing]
) -> None:
    config = small_config(inputs, tmp_path / "book")
    failing += [calibrating(FIRST), probing(LAST)]
    with pytest.raises(QuarantinedError):
        build(config)
    build(config, allow_quarantine=True)
    assert source(config.output) == "without 1 shards, calibrated without 1 shards"
    (tmp_path / "book").rename(tmp_path / "first")
    failing.clear()
    with pytest.raises(UserError, match=rf"resolved without {FIRST}, which is calibrated now: delete that folder"):
        build(config)
    build(config, allow_quarantine=True)
    assert source(config.output) == "calibrated without 1 shards"
    (tmp_path / "book").rename(tmp_path / "second")
    RunFolder.of(config.output).parts.rename(tmp_path / "parts")
    assert build(config).digest == digest


def test_images_do_not_count_twice_because_a_shard_was_missing(tmp_path: Path, inputs: str, failing: list[Failing]) -> None:
    failing.append(probing(LAST))
    build(small_config(inputs, tmp_path / "partial"), allow_quarantine=True)
    failing.clear()
    Codebook.from_pretrained(tmp_path / "partial").save_pretrained(tmp_path / "book")
    extension = small_config(inputs, tmp_path / "extension")
    with pytest.raises(UserError, match=r"already built from or extended with these images"):
        Build(extension, LOCAL, quiet=True).extend(tmp_path / "book")
    assert not RunFolder.of(extension.output).has_scores


def test_selecting_from_an_interrupted_build_is_refused(tmp_path: Path, inputs: str, digest: str) -> None:
    config = small_config(inputs, tmp_path / "book")

    def stops_after(shards: int) -> Any:
        def runner(tasks: Any) -> Iterator[Any]:
            yield from LOCAL(tasks[:shards])
            if len(tasks) > shards:
                raise KeyboardInterrupt

        return runner

    with pytest.raises(KeyboardInterrupt):
        Build(config, stops_after(1), quiet=True).codebook()  # in calibration
    with pytest.raises(UserError, match=r"no committed scores"):
        reselect(config, tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        Build(config, stops_after(2), quiet=True).codebook()
    with pytest.raises(UserError, match=r"lacks the scores of 1 of 3 shards: run the build again to complete it"):
        reselect(config, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert build(config).digest == digest


def test_another_configuration_does_not_take_over_before_the_first_score(tmp_path: Path, inputs: str, digest: str) -> None:
    config = small_config(inputs, tmp_path / "book")
    other = config.model_copy(update={"seed": 1})

    def meanwhile(tasks: Any) -> Iterator[Any]:
        with pytest.raises(UserError, match=rf"belongs to configuration {config.probe_hash}, this one is {other.probe_hash}"):
            build(other)
        yield from LOCAL(tasks)

    report = Build(config, meanwhile, quiet=True).codebook()
    assert report.digest == digest
    assert RunFolder.of(config.output).probed_config() == config


def test_bad_calibration_images_do_not_speak_for_a_large_build(tmp_path: Path) -> None:
    """Two of the first seven are no third of 110 images; six are more than 5 % of any hundred."""
    config = {"tokens_per_image": 1}
    for bad, ends_well in ((2, True), (6, False)):
        shard = tmp_path / f"{bad}.tar"
        members = [(f"{i}.png", b"no" if i < bad else png(i, 16)) for i in range(110)]
        thresholds = {"calibration_images": 7, "top1_prob": {"quantile": 0.9}, "influence": {"quantile": 0.9}}
        small = small_config(str(write_tar(shard, members)), tmp_path / f"book-{bad}", probe=config, thresholds=thresholds)
        job = Build(small, LOCAL, quiet=True)
        scanned = job.run.inputs(small.shards)
        if ends_well:
            job._calibrate(scanned)
        else:
            with pytest.raises(UserError, match=r"6 images cannot be used, cluster.max_bad_fraction allows 5% of 100: "):
                job._calibrate(scanned)
        assert len(json.loads((job.run.path / "skipped.json").read_text())) == bad
