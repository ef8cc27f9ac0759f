"""A real Ray cluster of two nodes on this machine, whose parts can be killed."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.processes import descendants
from reference_vlm.local_ray import RAY, answers, free_ports

SECONDS = 600


def kill(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process of ours and all below it."""
    for pid in [*descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def until(condition: Callable[[], Any], process: subprocess.Popen[Any], pause: float = 0.05) -> None:
    """Wait until something is so, or the process has ended."""
    deadline = time.monotonic() + SECONDS
    while not condition() and process.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(pause)


class Cluster:
    """A head and a second node, one worker's CPU each, with a token and a home of their own.

    Ray takes no loopback address for the nodes of a cluster: it listens on every interface, and the token protects it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.port, self.dashboard, client, agent = free_ports(4)
        paths = os.pathsep.join(str(ROOT / p) for p in (".", "runtime", "schemas"))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "PYTHONPATH": paths,
            "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_worker_niceness": "0", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        self.head = self._start(
            "--head", f"--port={self.port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}",
            f"--ray-client-server-port={client}", f"--temp-dir={self.folder}/ray", f"--dashboard-agent-listen-port={agent}",
        )  # fmt: skip
        self.node: subprocess.Popen[Any] | None = None
        try:
            until(lambda: answers(self.dashboard), self.head)
            self.add_node()
        except BaseException:
            self.close()
            raise

    def _start(self, *options: str) -> subprocess.Popen[Any]:
        command = [
            RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=100000000",
            "--disable-usage-stats", *options,
        ]  # fmt: skip
        with open(self.folder / "ray.log", "a") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def add_node(self) -> None:
        """Start the second node; it registers by itself, later.

        As another machine it has a folder of its own: in a common one both nodes unpack the same job's code at once.
        """
        if self.node is None:
            self.started += 1
            self.node = self._start(
                f"--address=127.0.0.1:{self.port}", f"--temp-dir={self.folder}/n{self.started}",
                f"--dashboard-agent-listen-port={free_ports(1)[0]}",
            )  # fmt: skip

    def kill_node(self) -> None:
        """SIGKILL of everything on the second node."""
        if self.node is not None:
            kill(self.node)
            self.node = None

    def workers(self) -> list[int]:
        """Processes of worker actors on both nodes."""
        nodes = [n for n in (self.head, self.node) if n is not None]
        return [pid for node in nodes for pid, name in descendants(node.pid).items() if "ray::ShardActor" in name]

    def drivers(self, config: Path) -> list[int]:
        """Processes of a submitted job that builds `config`."""
        wanted = ("jobs/build_codebook.py", str(config))
        return [pid for pid, name in descendants(self.head.pid).items() if all(text in name for text in wanted)]

    def stop_job(self, name: str) -> None:
        """What `ray job stop` asks for, without the seconds it takes to start."""
        address = f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{name}/stop"
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        urllib.request.urlopen(urllib.request.Request(address, headers=headers, method="POST"), timeout=60).close()  # noqa: S310

    def close(self) -> None:
        """End both nodes."""
        self.kill_node()
        kill(self.head)
