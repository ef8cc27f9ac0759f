"""The real job on a real cluster: `ray start`, `ray job submit`, and the codebook it leaves behind."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import descendants, end

from codebook_builder.artefact import verify
from codebook_builder.shards import write_shard
from codebook_prune.codebook import Codebook
from reference_vlm.local_ray import RAY, answers, free_ports
from reference_vlm.scenes import make_scene, render

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node on loopback with its own home, ports and token; the environment in which jobs may be submitted to it."""
    home = tmp_path_factory.mktemp("home")
    gcs, dashboard, client, agent = free_ports(4)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = [
        RAY, "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={agent}", "--num-cpus=4", "--object-store-memory=134217728", f"--temp-dir={home}/ray",
    ]  # fmt: skip
    log = (home / "start.log").open("w")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not answers(dashboard):
            assert head.poll() is None, (home / "start.log").read_text()
            assert time.monotonic() < deadline, (home / "start.log").read_text()
            time.sleep(0.2)
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "GCS_ADDRESS": f"127.0.0.1:{gcs}"}
    finally:
        ours = descendants(head.pid)
        head.send_signal(signal.SIGTERM)
        end([head.pid, *ours], seconds=20)
        head.wait()
        log.close()


def submission(*arguments: str) -> list[str]:
    return [RAY, "job", "submit", "--working-dir", str(ROOT), "--", "python", "jobs/build_codebook.py", *arguments]


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(submission(*arguments), env=environment, capture_output=True, text=True, timeout=300, check=False)


def write_config(folder: Path, name: str, **changes: object) -> str:
    data = {
        "model": "reference_vlm/checkpoint", "shards": [str(folder / "s-{000..001}.tar")], "output": str(folder / "book"),
        "probe": {"tokens_per_image": 8},
        "thresholds": {"calibration_images": 3, "top1_prob": {"quantile": 0.9}, "influence": {"quantile": 0.9}},
        "selection": {"min_images": 1, "inter_clusters": 2, "intra_clusters": 4},
        "cluster": {"workers": 2, "cpus_per_worker": 0.5},
    }  # fmt: skip
    (folder / name).write_text(json.dumps(data | changes))
    return str(folder / name)


def write_shards(folder: Path) -> None:
    for s in range(2):
        samples = ((f"{s}-{i}", {"png": render(make_scene("codebook", 3 * s + i), canvas=True)}) for i in range(3))
        write_shard(folder / f"s-{s:03d}.tar", samples)


@pytest.mark.cluster
def test_a_submitted_job_builds_the_codebook_a_local_run_builds(cluster: dict[str, str], tmp_path: Path) -> None:
    write_shards(tmp_path)
    job = submit(cluster, write_config(tmp_path, "c.json"), "--json")
    assert job.returncode == 0, job.stdout + job.stderr
    manifest = verify(tmp_path / "book")
    assert manifest.counts["images"] == 6
    assert len(Codebook.from_pretrained(tmp_path / "book")) == manifest.rows > 0
    config = write_config(tmp_path, "local.json", output=str(tmp_path / "local"))
    command = [sys.executable, "-m", "codebook_builder.cli", "run", config, "--local", "--json"]
    local = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert local["digest"] in job.stdout


@pytest.mark.cluster
def test_a_job_that_cannot_work_fails_with_one_line(cluster: dict[str, str], tmp_path: Path) -> None:
    job = submit(cluster, write_config(tmp_path, "c.json", output="book"))
    assert job.returncode != 0
    assert "error: " in job.stdout
    assert "must be an absolute path" in job.stdout
    assert "Traceback" not in job.stdout


@pytest.mark.cluster
def test_a_job_waits_for_a_node_that_joins_late(cluster: dict[str, str], tmp_path: Path) -> None:
    """As on a cluster whose worker group starts at zero nodes: no node is large enough until one joins."""
    write_shards(tmp_path)
    workers = {"workers": 1, "cpus_per_worker": 6, "wait_for_nodes": 60}
    config = write_config(tmp_path, "late.json", cluster=workers)
    job = subprocess.Popen(
        submission(config, "--json"), env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    time.sleep(8)
    assert job.poll() is None, "the job did not wait"
    with tempfile.TemporaryDirectory(prefix="n", ignore_cleanup_errors=True) as own:  # short: it holds sockets
        node_command = [
            RAY, "start", f"--address={cluster['GCS_ADDRESS']}", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=6",
            f"--dashboard-agent-listen-port={free_ports(1)[0]}", "--object-store-memory=134217728",
            f"--temp-dir={own}",
        ]  # fmt: skip
        node = subprocess.Popen(node_command, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            out, _ = job.communicate(timeout=200)
        finally:
            ours = descendants(node.pid)
            node.send_signal(signal.SIGTERM)
            end([node.pid, *ours], seconds=20)
            said, _ = node.communicate()
    assert job.returncode == 0, out + said
    assert verify(tmp_path / "book").counts["images"] == 6


def status_of(cluster: dict[str, str], token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{cluster['RAY_API_SERVER_ADDRESS']}/api/jobs/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.cluster
def test_the_job_server_answers_only_to_the_token(cluster: dict[str, str]) -> None:
    """What it is sent it runs."""
    assert status_of(cluster, cluster["RAY_AUTH_TOKEN"]) == 200
    assert status_of(cluster, None) == 401
    assert status_of(cluster, secrets.token_hex(32)) in (401, 403)


@pytest.mark.cluster
def test_the_token_is_in_no_log_and_no_output(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of everything that was written for this module's jobs: Ray's logs, run folders, codebooks."""
    token = cluster["RAY_AUTH_TOKEN"].encode()
    files = [p for p in tmp_path_factory.getbasetemp().rglob("*") if p.is_file() and not p.is_symlink()]
    assert any("job-driver" in p.name for p in files)
    assert [p for p in files if token in p.read_bytes()] == []
