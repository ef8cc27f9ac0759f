"""A sample that crashes, hangs or eats its worker costs its own shard only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from building import scene_shards, small_config, write_config

from codebook_builder.build import Build
from codebook_builder.listeners import LOOPBACK
from codebook_builder.run import RunFolder
from codebook_builder.worker import run_locally

ROOT = Path(__file__).parents[2]
DRIVER = """
import json, os, socket, subprocess, sys
from pathlib import Path
from biting import BitingActor
from processes import descendants, listeners
from codebook_builder import cluster, dispatch
from codebook_builder.build import Build, QuarantinedError
from codebook_builder.tasks import Failure, ShardTask
from codebook_schemas import BuildConfig, ClusterConfig
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
    build = BuildConfig.from_file(sys.argv[1])
    given_up = []
    try:
        Build(build, lambda tasks: dispatch.Dispatch(build.cluster, tasks).outcomes(), quiet=True).codebook()
    except QuarantinedError as error:
        given_up = error.shards
    control = socket.create_server(("0.0.0.0", 0))
    ports = sorted(listeners([os.getpid(), *descendants(os.getpid())]))
    said = {name: process.communicate()[0].strip() for name, process in strangers.items()}
told = {"found": found, "given_up": given_up, "said": said, "token": token, "ports": ports}
print(json.dumps(told | {"control": control.getsockname()[1]}))
"""


@pytest.mark.cluster
def test_segfault_hang_and_memory_are_given_up_and_strangers_do_not_get_in(tmp_path: Path) -> None:
    """One embedded Ray for all of it: it is slow to start. A build that was bitten ends in the codebook of one that was not."""
    names = ("good", "segfault", "hang", "memory")
    for number, name in enumerate(names):
        scene_shards(tmp_path / name, shards=1, images=2, first=10 * number)
        (tmp_path / name / "s-000.tar").rename(tmp_path / f"{name}.tar")
    limits = {"workers": 2, "cpus_per_worker": 0.5, "attempts": 1, "shard_seconds": 40, "worker_memory_gb": 2}
    numbers = {"top1_prob": 0.9, "influence": 0.9}
    config = small_config(f"{tmp_path}/{{{','.join(names)}}}.tar", tmp_path / "book", cluster=limits, thresholds=numbers)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": paths, "RAY_memory_monitor_refresh_ms": "0"}
    command = [sys.executable, "-c", DRIVER, str(write_config(config, tmp_path / "c.json"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    found = said["found"]
    assert {name for name, error in found.items() if error is None} == {
        f"0000{i}-{n}" for i, n in zip("02467", "abcde", strict=True)
    }
    assert "died" in found["00001-segfault"]
    assert "took more than 40 seconds" in found["00003-hang"]
    assert "held more than 0.8 GiB" in found["00005-memory"]
    assert said["given_up"] == [f"0000{i}-{name}.tar" for i, name in enumerate(names) if i]
    run = RunFolder.of(config.output)
    assert list((run.parts / "_done").iterdir()) == [run.parts / "_done" / "00000-good.tar.json"]
    assert len(list(run.parts.glob("part-*"))) > 1  # what the bitten left half-written
    healthy = config.model_copy(update={"output": str(tmp_path / "healthy")})
    again, whole = (Build(c, partial(run_locally, attempts=1), quiet=True).codebook() for c in (config, healthy))
    assert again.digest == whole.digest
    assert not list(run.quarantine.iterdir())
    assert said["said"] == {"none": "", "wrong": "", "right": "connected"}
    assert [port for address, port in said["ports"] if address not in LOOPBACK] == [said["control"]]
    assert len(said["ports"]) > 8  # Ray's own
    assert len(said["token"]) == 64
    assert said["token"] not in done.stderr + json.dumps(found)
