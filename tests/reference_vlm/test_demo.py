"""The demo around its measurements: its Ray is closed to others, no stale codebook is shown, a mistake is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import descendants, listeners

from codebook_builder.doctor import ray_listeners
from codebook_schemas import UserError
from reference_vlm import demo
from reference_vlm.local_ray import RAY, local_ray


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every job that the demo submits; Ray and the job are stand-ins, the checkpoint is one small file."""
    found: list[str] = []

    @contextmanager
    def no_ray(folder: Path, cpus: int) -> Iterator[dict[str, str]]:
        yield {}

    def build(command: list[str], env: dict[str, str]) -> None:
        book = Path(command[-1]).parent / "codebook"
        assert not (book / "manifest.json").exists()
        book.mkdir()
        (book / "manifest.json").write_text(command[-1])
        (book.parent / "codebook.run").mkdir()
        found.append(command[-1])

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(demo, "local_ray", no_ray)
    monkeypatch.setattr(demo, "run_quietly", build)
    monkeypatch.setattr(demo, "checkpoint_files", lambda: [tmp_path / "model.safetensors"])
    return found


def test_a_stale_codebook_is_built_again(tmp_path: Path, builds: list[str]) -> None:
    folder = tmp_path / "demo"
    for _ in range(2):
        demo.build_codebook(folder, 8, 1)
        assert len(builds) == 1
    demo.build_codebook(folder, 8, 2)  # the number of workers changes nothing
    assert len(builds) == 1
    (tmp_path / "model.safetensors").write_bytes(b"others")
    demo.build_codebook(folder, 8, 1)
    assert len(builds) == 2
    demo.build_codebook(folder, 9, 1)
    assert len(builds) == 3
    (folder / "codebook" / "manifest.json").unlink()
    (folder / "codebook").rmdir()
    (folder / "codebook.run" / "scores").touch()
    with pytest.raises(FileExistsError):  # of the stand-in: an interrupted build of the same goes on with its scores
        demo.build_codebook(folder, 9, 1)


def test_a_codebook_of_someone_else_is_not_touched(tmp_path: Path, builds: list[str]) -> None:
    book = tmp_path / "demo" / "codebook"
    book.mkdir(parents=True)
    (book / "manifest.json").write_text("mine")
    with pytest.raises(UserError, match="holds a codebook of unknown origin: remove it, or choose another --out"):
        demo.build_codebook(tmp_path / "demo", 8, 1)
    assert (book / "manifest.json").read_text() == "mine"
    assert not builds


def test_the_checkpoint_is_read_whole() -> None:
    assert {"config.json", "model.safetensors"} <= {path.name for path in demo.checkpoint_files()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "0"], "argument --images: must be a whole number, 8 or more, not '0' (see --help)"),
        (["--questions", "-1"], "argument --questions: must be a whole number, 6 or more, not '-1' (see --help)"),
        (["--workers", "many"], "argument --workers: must be a whole number, 1 or more, not 'many' (see --help)"),
        (["--what"], "unrecognized arguments: --what (see --help)"),
        (["--out", "/dev/null/x"], "/dev/null/x: Not a directory"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(arguments) == 2
    assert capsys.readouterr().out == f"error: {said}\n"


@pytest.mark.cluster
def test_the_ray_of_the_demo_takes_jobs_on_loopback_only(tmp_path: Path) -> None:
    before = set(descendants_of_ours())
    with local_ray(tmp_path, 1) as env:
        command = [RAY, "job", "submit", "--", sys.executable, "-c", "import ray; ray.init('auto'); print('it', 'ran')"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        stranger = env | {"RAY_AUTH_TOKEN": "0" * 64}
        refused = subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=120, check=False)
        found = listeners(set(descendants_of_ours()) - before)
        seen = [line for line in ray_listeners(Path("/proc")) if int(env["RAY_ADDRESS"].rpartition(":")[2]) in line[1]]
        agents = [line for line in ray_listeners(Path("/proc")) if int(line[0].split()[-1][:-1]) in descendants_of_ours()]
    assert "it ran" in done.stdout, done.stdout + done.stderr
    assert refused.returncode != 0
    assert "it ran" not in refused.stdout
    assert len(found) > 8
    assert [listener for listener in found if not listener.on_loopback] == []
    assert [(line[0].split(" (")[0], line[2:]) for line in seen] == [("job server", (False, True))]  # as doctor sees it
    assert sorted((line[0].split(" (")[0], line[2:]) for line in agents) == [
        ("job agent", (False, True)), ("job server", (False, True)),
    ]  # fmt: skip


def descendants_of_ours() -> dict[int, str]:
    """Processes below this one."""

    return descendants(os.getpid())
