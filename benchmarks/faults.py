"""Faults injected at random moments into builds on a real Ray cluster of two nodes on loopback.

After each, the same command runs again until it ends well. Then the codebook's digest must be the uninterrupted build's, every
row must be there once, and after `gc` no stray file may be left. The faults and their moments follow from the seed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks import ROOT
from benchmarks.processes import descendants
from codebook_builder.commit import read_marker, read_part, verify_part
from codebook_builder.shards import write_shard
from reference_vlm import CHECKPOINT
from reference_vlm.scenes import make_scene, render

SHARDS, IMAGES = 4, 2
SECONDS = 600
RAY = str(Path(sys.executable).with_name("ray"))
SURVIVED = ("worker", "node", "late node")
"""Faults that the running build itself gets over; the others strike only if they end it."""
FAULTS = ("worker", "driver", "node", "interrupt", "disk full", "late node", "job stop")


def kill(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process of ours and all below it."""
    for pid in [*descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Cluster:
    """A head and a second node, one worker's CPU each, with a token and a home of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.dashboard = folder, free_port(), free_port()
        paths = os.pathsep.join(str(ROOT / p) for p in (".", "runtime", "schemas"))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "PYTHONPATH": paths,
            "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        self.head = self._start(
            "--head", f"--port={self.port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}",
            f"--ray-client-server-port={free_port()}",
        )  # fmt: skip
        until(lambda: answers(self.dashboard), self.head)
        self.node: subprocess.Popen[Any] | None = None
        self.add_node()

    def _start(self, *options: str) -> subprocess.Popen[Any]:
        command = [
            RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=100000000",
            f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats", *options,
        ]  # fmt: skip
        if "--head" in options:
            command.append(f"--temp-dir={self.folder}/ray")
        with open(self.folder / "ray.log", "a") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def add_node(self) -> None:
        """Start the second node; it registers by itself, later."""
        if self.node is None:
            self.node = self._start(f"--address=127.0.0.1:{self.port}")

    def kill_node(self) -> None:
        """SIGKILL of everything on the second node."""
        if self.node is not None:
            kill(self.node)
            self.node = None

    def workers(self) -> list[int]:
        """Processes of worker actors on both nodes."""
        nodes = [n for n in (self.head, self.node) if n is not None]
        return [pid for node in nodes for pid, name in descendants(node.pid).items() if "ray::ShardActor" in name]

    def stop_job(self, name: str) -> None:
        """What `ray job stop` asks for, without the seconds it takes to start."""
        address = f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{name}/stop"
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        urllib.request.urlopen(urllib.request.Request(address, headers=headers, method="POST"), timeout=60).close()  # noqa: S310

    def close(self) -> None:
        """End both nodes."""
        self.kill_node()
        kill(self.head)


def answers(port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], Any], process: subprocess.Popen[Any]) -> None:
    """Wait until something is so, or the process has ended."""
    deadline = time.monotonic() + SECONDS
    while not condition() and process.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


class Trial:
    """One build, one fault, and the checks afterwards."""

    def __init__(self, cluster: Cluster, folder: Path, shards: Path, rng: np.random.Generator) -> None:
        self.cluster, self.folder, self.shards, self.rng = cluster, folder, shards, rng
        folder.mkdir()
        self.run = folder / "book.run"
        self.config = write_config(folder, shards)

    def start(self, job: bool = False) -> subprocess.Popen[Any]:
        """The build, by the command line or as a submitted job."""
        command = [sys.executable, "-m", "codebook_builder.cli", "run", str(self.config), "--json",
                   f"--address=127.0.0.1:{self.cluster.port}"]  # fmt: skip
        if job:
            command = [RAY, "job", "submit", "--submission-id", self.folder.name, "--working-dir", str(ROOT), "--",
                       "python", "jobs/build_codebook.py", str(self.config), "--json"]  # fmt: skip
        return subprocess.Popen(
            command, cwd=ROOT, env=self.cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def moment(self, process: subprocess.Popen[Any]) -> str:
        """Wait for a moment of the build drawn at random; its name."""
        done = int(self.rng.integers(-1, SHARDS - 1))
        if done < 0:
            until(lambda: list(self.run.glob("calibration/part-*")), process)
        else:
            until(
                lambda: len(list(self.run.glob("parts/_done/*.json"))) >= done and list(self.run.glob("parts/part-*")), process
            )
        time.sleep(float(self.rng.random()))
        return "calibrating" if done < 0 else f"{done} of {SHARDS} shards done"

    def inject(self, fault: str) -> tuple[subprocess.Popen[Any], str]:
        """Start a build and bring the fault about; (the build's process, the moment)."""
        if fault == "late node":
            self.cluster.kill_node()
        if fault == "disk full":
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={int(self.rng.integers(8, 40))}k", "t", self.folder], check=True
            )
            write_config(self.folder, self.shards)
        process = self.start(job=fault == "job stop")
        moment = "always" if fault == "disk full" else self.moment(process)
        if fault == "worker":
            until(self.cluster.workers, process)
            with suppress(ProcessLookupError):  # ended by itself meanwhile
                os.kill(int(self.rng.choice(self.cluster.workers())), signal.SIGKILL)
        elif fault == "driver":
            process.kill()
        elif fault == "interrupt":
            process.send_signal(signal.SIGINT)
        elif fault == "node":
            self.cluster.kill_node()
        elif fault == "late node":
            self.cluster.add_node()
        elif fault == "job stop":
            self.cluster.stop_job(self.folder.name)
        return process, moment

    def once(self, fault: str, digest: str, rows: int) -> dict[str, Any]:
        """Run the trial; every field but `fault`, `moment` and the counts must be what a sound build has."""
        try:
            process, moment = self.inject(fault)
            out, _ = process.communicate(timeout=SECONDS)
            codes, reruns = [process.returncode], 0
            if fault == "disk full":
                subprocess.run(["mount", "-o", "remount,size=64m", self.folder], check=True)
            while (process.returncode != 0 or '"digest"' not in out) and reruns < 3:  # a stopped job's command ends with 0
                reruns += 1
                process = self.start()
                out, _ = process.communicate(timeout=SECONDS)
                codes.append(process.returncode)
            struck = fault in SURVIVED or reruns > 0
            return {"fault": fault, "moment": moment, "struck": struck, "exit codes": codes, **self.check(digest, rows, out)}
        finally:
            if fault == "disk full":
                subprocess.run(["umount", self.folder], check=True)
            self.cluster.add_node()

    def check(self, digest: str, rows: int, out: str) -> dict[str, Any]:
        """What is wrong after the build has ended well."""
        ended = [line for line in out.splitlines() if line.startswith("{")]
        if not ended:
            return {"problem": f"the build never ended well: {out[-300:]}"}
        tables = []
        for name in sorted(p.stem for p in (self.run / "parts/_done").glob("*.json")):
            marker = read_marker(self.run / "parts", name)
            if marker is not None:
                verify_part(self.run / "parts", marker)
                tables += [t.select(["shard", "key", "token"]) for t in read_part(self.run / "parts", marker)]
        found = pa.concat_tables(tables)
        distinct = found.group_by(["shard", "key", "token"]).aggregate([]).num_rows
        command = [sys.executable, "-m", "codebook_builder.cli", "gc", str(self.run), "--grace-hours", "0"]
        subprocess.run(command, cwd=ROOT, env=self.cluster.environment, check=True, capture_output=True)
        parts = len(list(self.run.glob("parts/part-*")))
        strays = [p.name for p in self.folder.rglob("*.tmp")]
        wrong = {
            "digest": json.loads(ended[-1])["digest"] != digest,
            "rows lost or twice": not rows == found.num_rows == distinct or pc.count(found["key"]).as_py() != rows,
            "stray files": parts != SHARDS or bool(strays),
        }
        return {"rows": found.num_rows, "problem": ", ".join(name for name, is_so in wrong.items() if is_so)}


def write_config(folder: Path, shards: Path) -> Path:
    """A small build of all shards with two workers."""
    data = {
        "model": str(CHECKPOINT), "shards": [f"{shards}/s-{{0..{SHARDS - 1}}}.tar"], "output": str(folder / "book"),
        "probe": {"tokens_per_image": 6},
        "thresholds": {"calibration_images": 3, "top1_prob": {"quantile": 0.9}, "influence": {"quantile": 0.9}},
        "selection": {"min_images": 0, "inter_clusters": 2, "intra_clusters": 2},
        "cluster": {"workers": 2, "cpus_per_worker": 1, "attempts": 3},
    }  # fmt: skip
    (folder / "c.json").write_text(json.dumps(data))
    return folder / "c.json"


def plan(tried: Sequence[str], count: int) -> list[tuple[int, str]]:
    """(number, fault) of the trials that are missing of `count` after those of the faults `tried`; the least tried comes first.

    The full disk needs root (it is a small tmpfs); without, it is left out.
    """
    times = {fault: tried.count(fault) for fault in FAULTS if fault != "disk full" or os.geteuid() == 0}
    found = []
    for number in range(len(tried), count):
        fault = min(times, key=times.__getitem__)
        times[fault] += 1
        found.append((number, fault))
    return found


def trials(planned: Sequence[tuple[int, str]], seed: int) -> Iterator[dict[str, Any]]:
    """Run some trials on one cluster; yields what each did."""
    with tempfile.TemporaryDirectory(prefix="f", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        shards = folder / "shards"
        shards.mkdir()
        for s in range(SHARDS):
            scenes = ((f"{s}-{i}", {"png": render(make_scene("codebook", IMAGES * s + i), canvas=True)}) for i in range(IMAGES))
            write_shard(shards / f"s-{s}.tar", scenes)
        (folder / "whole").mkdir()
        command = [sys.executable, "-m", "codebook_builder.cli", "run", str(write_config(folder / "whole", shards)),
                   "--local", "--json"]  # fmt: skip
        whole = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        cluster = Cluster(folder)
        try:
            for number, fault in planned:
                began = time.monotonic()
                one = Trial(cluster, folder / f"trial-{seed}-{number}", shards, np.random.default_rng([seed, number]))
                row = one.once(fault, whole["digest"], whole["counts"]["tokens"])
                yield {"trial": number, **row, "seconds": round(time.monotonic() - began)}
                shutil.rmtree(one.folder, ignore_errors=True)
        finally:
            cluster.close()
