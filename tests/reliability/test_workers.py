"""Retries, the bound on work in flight, code that differs, and placement: on real workers, of one Ray with two GPUs in name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
import json
import sys
from pathlib import Path
from biting import MeetingActor, RaisingActor
from codebook_builder import cluster, dispatch
from codebook_builder.tasks import Failure, ShardTask
from codebook_schemas import ClusterConfig, UserError
from codebook_schemas.inputs import ShardEntry

cluster._protect()
import ray

real = ray.init
ray.init = lambda *given, **options: real(*given, **options, num_gpus=2)
most = []

class Watched(dispatch.Dispatch):
    def _hand_out(self):
        super()._hand_out()
        most.append(max(len(worker.held) for worker in self.workers))

def run(actor, names, **config):
    dispatch.ShardActor = actor
    entries = [ShardEntry(name=f"{i:05d}-{n}", path="/x", bytes=1, sha256="0" * 64, samples=1) for i, n in enumerate(names)]
    found = {}
    tasks = [ShardTask(None, entry, Path(sys.argv[1])) for entry in entries]
    for outcome in Watched(ClusterConfig(cpus_per_worker=0.5, **config), tasks).outcomes():
        name = outcome.task.shard.name if isinstance(outcome, Failure) else outcome.shard
        assert name not in found
        found[name] = outcome.error if isinstance(outcome, Failure) else [s.key for s in outcome.skipped]
    return found

def refusal(work, *arguments, **options):
    try:
        work(*arguments, **options)
    except UserError as error:
        return str(error)

said = {}
with cluster.connected(ClusterConfig(workers=2, cpus_per_worker=0.5), None):
    said["retried"] = run(RaisingActor, ["a0", "b1", "c2", "d3", "e0"], workers=1, attempts=3, in_flight=2)
    said["most"] = max(most)
    said["placed"] = run(MeetingActor, ["a0", "b0", "c0", "d0", "e0", "f0"], workers=3, gpus_per_worker=1, attempts=1)
    said["room"] = refusal(cluster.check_placement, ClusterConfig(gpus_per_worker=3))
    cluster.check_placement(ClusterConfig(gpus_per_worker=2))
    dispatch.code_hash = lambda: "0" * 16
    said["code"] = refusal(run, RaisingActor, ["a0"], workers=1)
print(json.dumps(said))
"""


@pytest.mark.cluster
def test_real_workers_are_retried_bounded_checked_and_placed(tmp_path: Path) -> None:
    """One embedded Ray for all of it: it is slow to start."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": paths}
    (meeting := tmp_path / "meeting").mkdir()
    command = [sys.executable, "-c", DRIVER, str(meeting)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    given_up = said["retried"].pop("00003-d3")
    assert said["retried"] == {"00000-a0": [], "00001-b1": [], "00002-c2": [], "00004-e0": []}
    assert "RuntimeError: attempt 2 of 00003-d3" in given_up
    assert said["most"] == 2
    # A third worker finds no GPU and is not waited for; the other two have one each, and meet.
    assert sorted(said["placed"]) == [f"0000{i}-{n}0" for i, n in enumerate("abcdef")]
    assert {tuple(gpus) for gpus in said["placed"].values()} == {("0",), ("1",)}
    assert "a worker needs 1 CPUs and 3 GPUs on one node, the cluster's nodes have:" in said["room"]
    assert "2 GPUs" in said["room"]
    assert "workers run other code (" in said["code"]
    assert "than the driver (0000000000000000)" in said["code"]
