"""A disk that fills up: one clear error, nothing half-written, and the same command goes on once there is room.

The stand-in is the limit on file sizes, which the kernel enforces in the same place: a write that fails half way.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from building import DIMENSION, scene_shards, score_table, small_config

from codebook_builder import cli
from codebook_builder.artefact import digest
from codebook_builder.build import Build, QuarantinedError
from codebook_builder.commit import PartWriter
from codebook_builder.publish import reselect
from codebook_builder.run import RunFolder
from codebook_builder.worker import run_locally


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.mark.parametrize("size", [0, 3, 1000, 4000])
def test_a_part_that_does_not_fit_disappears(tmp_path: Path, size: int) -> None:
    def write() -> None:
        with PartWriter(tmp_path, "00000-a.tar", 0, DIMENSION) as part:
            part.write(score_table(images=3))

    with room_for(size), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        write()
    assert files(tmp_path) == set()
    write()
    assert len(files(tmp_path)) == 1


def test_a_build_on_a_full_disk_goes_on_when_there_is_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(scene_shards(tmp_path / "shards", shards=2, images=2), tmp_path / "book",
                          thresholds={"top1_prob": 0.9, "influence": 0.9})  # fmt: skip
    build = Build(config, lambda tasks: run_locally(tasks, attempts=1), quiet=True)
    with room_for(2000), pytest.raises(QuarantinedError):
        build.codebook()
    run = RunFolder.of(config.output)
    assert not list(run.parts.glob("part-*"))
    assert not (tmp_path / "book").exists()
    report = build.codebook()
    assert not list(run.quarantine.iterdir())
    for size in (0, 100, 600, 1500, 2500, 5000):
        before = files(tmp_path)
        with room_for(size), pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
            reselect(config, tmp_path / "again")
        assert files(tmp_path) == before
        assert cli.fail(caught.value) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ")
        assert os.strerror(errno.EFBIG) in said
    reselect(config, tmp_path / "again")
    assert digest(tmp_path / "again") == report.digest


def test_gc_clears_what_killed_processes_leave(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "book.run")
    strays = [run.path / ".input.json.0.tmp", run.parts / ".x.tmp", run.parts / "_done" / ".y.tmp", run.quarantine / ".z.tmp",
              run.calibration / "part-a-0-b.parquet", tmp_path / ".book.0.tmp" / "index" / "shard"]  # fmt: skip
    kept = [tmp_path / ".other.0.tmp", tmp_path / "book" / "manifest.json", run.path / "config.json"]
    for path in (*strays, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert run.collect_garbage(3600) == []
    assert len(run.collect_garbage(-5)) == len(strays)
    assert not any(path.exists() for path in strays)
    assert all(path.exists() for path in kept)
