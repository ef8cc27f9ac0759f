"""`codebook-build doctor`: what it sees is what is there, one line for each thing that is wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from codebook_builder import cli, doctor


def test_it_reports_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "codebook_builder.cli", "doctor", "--output", str(tmp_path / "book"), "--json"]
    environment = os.environ | {"HOME": str(tmp_path), "RAY_ADDRESS": "10.0.0.1:6379"}
    environment.pop("RAY_AUTH_MODE", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert f"torch {__import__('torch').__version__}" in found["packages"]
    assert "0 GPUs" in found["faiss"]
    assert str(tmp_path) in found["disk"]
    assert any("RAY_ADDRESS is set without RAY_AUTH_MODE=token" in line for line in found["problems"])
    assert all("\n" not in line for line in found["problems"])


def test_a_listener_without_token_is_a_problem(tmp_path: Path) -> None:
    """A /proc of our own making: Ray's processes on every interface or on loopback, and something else."""
    with socket.socket() as real:  # the format is the kernel's: take a true line and change its address
        real.bind(("0.0.0.0", 0))
        real.listen()
        inode = os.fstat(real.fileno()).st_ino
        port = real.getsockname()[1]
        head, *lines = Path("/proc/net/tcp").read_text().splitlines()
        line = next(line for line in lines if line.split()[9] == str(inode))
    (tmp_path / "net").mkdir()
    inner = line.replace("00000000:", "0100007F:", 1).replace(str(inode), "77")
    (tmp_path / "net/tcp").write_text("\n".join([head, line, inner, ""]))

    def process(pid: int, command: str, inode: int, environment: str, parent: int = 13) -> None:
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "cmdline").write_bytes(command.replace(" ", "\0").encode())
        (tmp_path / str(pid) / "environ").write_bytes(environment.encode())
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) b) S {parent} 1 1")
        (tmp_path / str(pid) / "fd/3").symlink_to(f"socket:[{inode}]")

    process(10, "/opt/raylet --x", inode, "A=1\0RAY_AUTH_MODE=token\0")
    process(11, "/opt/gcs_server --x", inode, "A=RAY_AUTH_MODE=token\0")
    process(12, "raylet", 77, "")
    process(13, "python raylet.py", inode, "")
    process(14, "/usr/bin/python /opt/ray/dashboard/dashboard.py --host=0.0.0.0", inode, "")
    process(15, "/usr/bin/python /opt/ray/dashboard/dashboard.py --host=127.0.0.1", 77, "RAY_AUTH_MODE=token")
    process(16, "ray::DashboardAgent", 77, "")
    process(17, "ray::DashboardAgent", 77, "ardAgent", parent=10)
    assert list(doctor.ray_listeners(tmp_path)) == [
        ("raylet (process 10)", [port], True, True), ("gcs_server (process 11)", [port], True, False),
        ("job server (process 14)", [port], True, False), ("job server (process 15)", [port], False, True),
        ("job agent (process 16)", [port], False, False), ("job agent (process 17)", [port], False, True),
    ]  # fmt: skip
    found = [f for f in doctor._ray(tmp_path) if f.name == "ray listener"]
    assert [f.problem for f in found if f.problem] == [
        f"{name} takes commands from {source} without a token: start it with RAY_AUTH_MODE=token"
        for name, source in (
            ("gcs_server (process 11)", "the network"), ("job server (process 14)", "the network"),
            ("job agent (process 16)", "every user of this machine"),
        )
    ]  # fmt: skip
    assert found[3].value == f"job server (process 15) on loopback: {port}"


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The `problem:` lines of the command."""
    monkeypatch.setattr(sys, "argv", ["codebook-build", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("problem: ")]
    assert ended.value.code == bool(lines)
    return lines


def test_packages_that_are_missing_or_in_each_others_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = said(monkeypatch, capsys)

    def installed(name: str) -> str:
        if name in ("ray", "pyarrow"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", installed)
    assert [line for line in said(monkeypatch, capsys) if line not in real] == [
        "problem: ray is not installed: pip install 'codebook-prune[build]'",
        "problem: pyarrow is not installed: pip install 'codebook-prune[build]'",
        "problem: faiss-cpu and faiss-gpu overwrite each other: uninstall both, then install one",
    ]


def test_no_faiss_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    line = "problem: faiss is not installed: pip install 'codebook-prune[cpu]' or 'codebook-prune[gpu]'"
    assert line in said(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"RAY_AUTH_MODE": "token"}, "RAY_AUTH_MODE is token, but there is none: ray get-auth-token --generate"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}, None),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "RAY_ADDRESS is set without RAY_AUTH_MODE=token"),
        ({}, None),
    ],
)
def test_a_missing_token_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], problem: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (found,) = doctor._ray(tmp_path)
    assert found.problem == problem or str(found.problem).startswith(str(problem))
    assert "a" * 64 not in found.value


@pytest.mark.parametrize("limit", ["LEAST_DISK_GB", "LEAST_MEMORY_GB", "LEAST_FILES"])
def test_too_little_room_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    assert [f for f in doctor._room(tmp_path) if f.problem] == []
    monkeypatch.setattr(doctor, limit, 10**9)
    assert len([f for f in doctor._room(tmp_path) if f.problem]) == 1
