"""A sample that crashes, hangs or eats its worker costs its own shard only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from codebook_builder.listeners import LOOPBACK

ROOT = Path(__file__).parents[2]
DRIVER = """
import json, os, socket, subprocess, sys
from pathlib import Path
from biting import BitingActor
from processes import descendants, listeners
from codebook_builder import cluster, dispatch
from codebook_builder.tasks import Failure, ShardTask
from codebook_schemas import ClusterConfig
from codebook_schemas.inputs import ShardEntry

dispatch.ShardActor = BitingActor
config = ClusterConfig(workers=2, cpus_per_worker=0.5, attempts=1, in_flight=2, shard_seconds=40, worker_memory_gb=0.8)
names = ["00000-a", "00001-segfault", "00002-b", "00003-hang", "00004-c", "00005-memory", "00006-d", "00007-e"]
entries = [ShardEntry(name=n, path="/x", bytes=1, sha256="0" * 64, samples=1) for n in names]
with cluster.connected(config, None) as runner:
    import ray

    address = ray.get_runtime_context().gcs_address
    token = os.environ["RAY_AUTH_TOKEN"]
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    code = f"import ray; ray.init('{address}', log_to_driver=False); print('connected')"
    tokens = {"none": None, "wrong": "0" * 64, "right": token}
    strangers = {
        name: subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=plain | ({} if value is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": value}),
        )
        for name, value in tokens.items()
    }
    found = {}
    for outcome in runner([ShardTask(None, entry, Path("/x")) for entry in entries]):
        name = outcome.task.shard.name if isinstance(outcome, Failure) else outcome.shard
        assert name not in found
        found[name] = outcome.error if isinstance(outcome, Failure) else None
    control = socket.create_server(("0.0.0.0", 0))
    ports = sorted(listeners([os.getpid(), *descendants(os.getpid())]))
    said = {name: process.communicate()[0].strip() for name, process in strangers.items()}
print(json.dumps({"found": found, "said": said, "token": token, "ports": ports, "control": control.getsockname()[1]}))
"""


@pytest.mark.cluster
def test_segfault_hang_and_memory_are_given_up_and_strangers_do_not_get_in(tmp_path: Path) -> None:
    """One embedded Ray for both: it is slow to start."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": paths, "RAY_memory_monitor_refresh_ms": "0"}
    command = [sys.executable, "-c", DRIVER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    found = said["found"]
    assert {name for name, error in found.items() if error is None} == {
        f"0000{i}-{n}" for i, n in zip("02467", "abcde", strict=True)
    }
    assert "died" in found["00001-segfault"]
    assert "took more than 40 seconds" in found["00003-hang"]
    assert "worker_memory_gb is 0.8" in found["00005-memory"]
    assert said["said"] == {"none": "", "wrong": "", "right": "connected"}
    assert [port for address, port in said["ports"] if address not in LOOPBACK] == [said["control"]]
    assert len(said["ports"]) > 8  # Ray's own
    assert len(said["token"]) == 64
    assert said["token"] not in done.stderr + json.dumps(found)
