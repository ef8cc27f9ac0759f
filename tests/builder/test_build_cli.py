"""The command line: exit codes, one-line errors, JSON on stdout and nothing else there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from building import scene_shards, small_config, write_config
from safetensors.torch import save_file

from codebook_builder import build as build_module
from codebook_builder import cli
from reference_vlm import CHECKPOINT


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["codebook-build", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def fails(result: tuple[int, str, str], message: str, code: int = 2) -> None:
    assert result[0] == code
    assert result[1] == ""
    lines = result[2].strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert "Traceback" not in result[2]


def small_codebook(folder: Path, seed: int) -> Path:
    folder.mkdir()
    vectors = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 8)).astype(np.float32))
    save_file({"prototypes": vectors}, folder / "p.safetensors")
    return folder / "p.safetensors"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['codebook-build', '--help']\n"
        "from codebook_builder.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'ray', 'faiss', 'pyarrow', 'transformers', 'webdataset'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("scan", "plan", "run", "select", "extend", "merge", "inspect", "import", "verify", "gc"):
        assert name in done.stdout


def test_the_whole_life_of_a_codebook(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ok(*arguments: object) -> dict[str, Any]:
        code, out, err = call(capsys, monkeypatch, *arguments, "--json")
        assert code == 0, err
        value: dict[str, Any] = json.loads(out)
        return value

    pattern = scene_shards(tmp_path / "shards")
    assert ok("scan", pattern, "--out", tmp_path / "inputs.json")["samples"] == 12
    config = write_config(small_config(str(tmp_path / "inputs.json"), tmp_path / "book"), tmp_path / "c.json")
    built = ok("run", config, "--local")
    assert built["prototypes"] > 0
    assert ok("inspect", tmp_path / "book")["digest"] == built["digest"]
    assert ok("verify", tmp_path / "book")["ok"]
    assert ok("select", config, "--output", tmp_path / "again")["digest"] == built["digest"]
    new = write_config(small_config(scene_shards(tmp_path / "new", first=50), tmp_path / "extension"), tmp_path / "new.json")
    assert ok("extend", tmp_path / "book", "--config", new, "--local")["prototypes"] > built["prototypes"]
    assert ok("merge", tmp_path / "book", tmp_path / "again", "--output", tmp_path / "both")["version"] == 1
    assert ok("gc", tmp_path / "book.run", "--grace-hours", 0)["deleted"] == 0
    imported = ok("import", small_codebook(tmp_path / "i", 0), "--output", tmp_path / "imported", "--model", "org/m")
    assert (imported["prototypes"], imported["dimension"]) == (4, 8)
    code, out, _ = call(capsys, monkeypatch, "inspect", tmp_path / "book")
    assert code == 0
    assert "index_recall 1.0" in out


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(message: str, *arguments: object) -> None:
        fails(call(capsys, monkeypatch, *arguments), message)

    bad("No such command", "frobnicate")
    bad("cannot read config", "run", tmp_path / "none.yaml", "--local")
    (tmp_path / "typo.yaml").write_text("model: m\nshards: [a]\noutput: o\nslection: {}")
    bad("slection: unknown key", "run", tmp_path / "typo.yaml", "--local")
    (tmp_path / "c.yaml").write_text(f"model: {tmp_path}\nshards: [{tmp_path}/a.tar]\noutput: {tmp_path}/o")
    bad("a.tar does not exist", "run", tmp_path / "c.yaml", "--local")
    bad("does not exist", "scan", tmp_path / "a.tar", "--out", tmp_path / "i.json")
    (tmp_path / "a.tar").write_text("no tar")
    bad("not an uncompressed tar", "scan", tmp_path / "a.tar", "--out", tmp_path / "i.json")
    bad("no Ray cluster at 127.0.0.1:9: Connection refused", "run", tmp_path / "c.yaml", "--address", "127.0.0.1:9")
    bad("no Ray cluster at ray://127.0.0.1:9", "run", tmp_path / "c.yaml", "--address", "ray://127.0.0.1:9")
    bad("is not a codebook", "inspect", tmp_path)
    bad("is not a codebook", "verify", tmp_path)
    bad("holds no scores", "select", tmp_path / "c.yaml", "--output", tmp_path / "s")
    bad("at least two", "merge", tmp_path, "--output", tmp_path / "m")
    bad("does not exist", "import", tmp_path / "x.pt", "--output", tmp_path / "m", "--model", "m")
    bad("neither a run folder", "gc", tmp_path)
    scene_shards(tmp_path, 1, 1)
    (tmp_path / "m.yaml").write_text(f"model: {tmp_path}\nshards: [{tmp_path}/s-000.tar]\noutput: {tmp_path}/o")
    bad("cannot load model", "run", tmp_path / "m.yaml", "--local", "--json")
    assert not (tmp_path / "o").exists()


def test_inspect_refuses_a_damaged_codebook(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_codebook(tmp_path / "i", 0)
    assert call(capsys, monkeypatch, "import", source, "--output", tmp_path / "book", "--model", "m/m")[0] == 0
    assert "files_verified" in call(capsys, monkeypatch, "inspect", tmp_path / "book")[1]
    path = next((tmp_path / "book").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    fails(call(capsys, monkeypatch, "inspect", tmp_path / "book"), "the SHA-256 of")


def test_nothing_asked_for_is_the_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = call(capsys, monkeypatch)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: ")
    assert "error" not in err


def test_quarantine_exits_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: build_module.Build) -> None:
        raise build_module.QuarantinedError(["00001-x.tar"], tmp_path)

    monkeypatch.setattr(build_module.Build, "codebook", stop)
    config = write_config(small_config(scene_shards(tmp_path), tmp_path / "book"), tmp_path / "c.json")
    fails(call(capsys, monkeypatch, "run", config, "--local"), "00001-x.tar", code=1)


def test_interruption_exits_with_130_and_one_line(tmp_path: Path) -> None:
    config = write_config(small_config(scene_shards(tmp_path), tmp_path / "book"), tmp_path / "c.json")
    command = [sys.executable, "-m", "codebook_builder.cli", "run", str(config), "--local", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "book.run").glob("calibration/part-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.strip().splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in err


def test_a_refused_config_binds_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first attempt with a wrong model, then the right one, into the same output."""
    pattern = scene_shards(tmp_path / "shards", shards=1, images=3)
    wrong = write_config(small_config(pattern, tmp_path / "book", model=str(tmp_path / "none")), tmp_path / "wrong.json")
    fails(call(capsys, monkeypatch, "run", wrong, "--local"), "is neither a folder nor a Hub id")
    right = write_config(small_config(pattern, tmp_path / "book", selection={"min_images": 0}), tmp_path / "right.json")
    assert call(capsys, monkeypatch, "run", right, "--local", "--json")[0] == 0


def test_a_damaged_model_is_not_blamed_on_a_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = scene_shards(tmp_path / "shards", shards=1, images=1)
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    with open(tmp_path / "model" / "model.safetensors", "r+b") as handle:
        handle.truncate(1000)
    config = write_config(small_config(pattern, tmp_path / "book", model=str(tmp_path / "model")), tmp_path / "c.json")
    fails(call(capsys, monkeypatch, "run", config, "--local"), "cannot load model")


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_a_threshold_must_be_finite(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text(f"model: m\nshards: [s.tar]\noutput: o\nthresholds: {{top1_prob: {value}}}\n")
    fails(call(capsys, monkeypatch, "run", tmp_path / "c.yaml", "--local"), "finite number")
    assert not list(tmp_path.glob("o*"))


def test_places_that_cannot_be_written_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = scene_shards(tmp_path / "shards", shards=1, images=1)
    (tmp_path / "file").write_text("")
    config = write_config(small_config(pattern, tmp_path / "file" / "book"), tmp_path / "c.json")
    fails(call(capsys, monkeypatch, "run", config, "--local"), str(tmp_path / "file"))
    fails(call(capsys, monkeypatch, "scan", pattern, "--out", tmp_path), str(tmp_path))
    for output in ("/", "..", "a\0b"):
        config.write_text(json.dumps({"model": "m", "shards": [pattern], "output": output}))
        for name in ("run", "select"):
            more = ["--local"] if name == "run" else ["--output", str(tmp_path / "x")]
            fails(call(capsys, monkeypatch, name, config, *more), "names no folder that a codebook could become")
    fails(call(capsys, monkeypatch, "import", ".", "--output", tmp_path / "x", "--model", "m/m"), "is not a file")
    source = small_codebook(tmp_path / "source", 0)
    fails(
        call(capsys, monkeypatch, "import", source, "--output", tmp_path / "file" / "x", "--model", "m/m"),
        str(tmp_path / "file"),
    )
