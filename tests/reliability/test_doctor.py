"""`codebook-build doctor`: what it sees is what is there, one line for each thing that is wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from codebook_builder import doctor


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
    """A /proc of our own making: a raylet on every interface, one on loopback, and something else."""
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

    def process(pid: int, name: str, inode: int, environment: str) -> None:
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "cmdline").write_bytes(f"/opt/{name}\0--x".encode())
        (tmp_path / str(pid) / "environ").write_bytes(environment.encode())
        (tmp_path / str(pid) / "fd/3").symlink_to(f"socket:[{inode}]")

    process(10, "raylet", inode, "A=1\0RAY_AUTH_MODE=token\0")
    process(11, "gcs_server", inode, "A=RAY_AUTH_MODE=token\0")
    process(12, "raylet", 77, "")
    process(13, "python", inode, "")
    assert doctor.ray_listeners(tmp_path) == [
        ("raylet (process 10)", [port], True), ("gcs_server (process 11)", [port], False)
    ]  # fmt: skip
    problems = [f.problem for f in doctor._ray(tmp_path) if f.name == "ray listener"]
    assert problems[0] is None
    assert "without a token" in str(problems[1])


@pytest.mark.parametrize("limit", ["LEAST_DISK_GB", "LEAST_MEMORY_GB", "LEAST_FILES"])
def test_too_little_room_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    assert [f for f in doctor._room(tmp_path) if f.problem] == []
    monkeypatch.setattr(doctor, limit, 10**9)
    assert len([f for f in doctor._room(tmp_path) if f.problem]) == 1
