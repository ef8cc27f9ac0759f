"""A Ray head of our own on loopback, with a job server that asks for a token: what `make demo` submits its job to."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
"""The ray executable of this environment."""
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Without it Ray (2.60) takes no loopback address for a node's and listens on every interface; with it there is one node."""


class StartError(RuntimeError):
    """Ray did not start."""


def free_ports(number: int) -> list[int]:
    """So many different TCP ports that are free on loopback now."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


def answers(port: int) -> bool:
    """Whether something listens on that port of loopback."""
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def local_ray(folder: Path, cpus: int) -> Iterator[dict[str, str]]:
    """A Ray head that listens on loopback only and asks for a token; yields the environment its clients need.

    Only the processes started here are stopped.

    Raises:
        StartError: it does not start.
    """
    gcs, dashboard, agent, client = free_ports(4)
    start_env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | LOOPBACK_ONLY
    start_env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [
        RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--include-dashboard=true",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", f"--num-cpus={cpus}", "--object-store-memory=200000000",
    ]  # fmt: skip
    with (
        open(folder / "ray.log", "w") as log,
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch,
    ):
        command.append(f"--temp-dir={scratch}")
        head = subprocess.Popen(command, env=start_env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_for(dashboard, head, folder / "ray.log")
            yield start_env | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        finally:
            stop(head)


def wait_for(port: int, head: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> None:
    """Wait until the job server answers; StartError if the head dies or takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and head.poll() is None:
        if answers(port):
            return
        time.sleep(0.3)
    raise StartError(f"the local Ray head did not start; see {log}")


def stop(head: subprocess.Popen[bytes]) -> None:
    """End the head, which ends what it started; what does not listen within 20 seconds is killed."""
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
