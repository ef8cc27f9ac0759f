"""Faults injected at random moments into builds on a real Ray cluster of two nodes on loopback.

After each, the same command runs again until it ends well. Then the codebook's digest must be the uninterrupted build's, every
row must be there once, and after `gc` exactly its files. The faults and their moments follow from the seed.

The driver's own moments (selection, writing, the commit) last milliseconds: there it is stopped (SIGSTOP) while the fault is
brought about, and goes on afterwards. The moment in a row is where the build was found then, by its files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from benchmarks import ROOT
from benchmarks.processes import is_told, stopped
from benchmarks.two_nodes import SECONDS, Cluster, until
from codebook_builder.artefact import CARD
from codebook_builder.commit import read_marker, read_part, verify_part
from codebook_builder.shards import write_shard
from codebook_schemas.manifest import MANIFEST
from reference_vlm import CHECKPOINT
from reference_vlm.local_ray import RAY
from reference_vlm.scenes import make_scene, render

SHARDS, IMAGES = 4, 2
FAULTS = ("worker", "driver", "node", "interrupt", "disk full", "late node", "job stop")
SURVIVED = ("worker", "node", "late node")
"""Faults that the running build itself gets over; the others strike only if they end it."""
PROBING = ("calibrating", *(f"{n} of {SHARDS} shards done" for n in range(SHARDS)))
MOMENTS = (*PROBING, "selecting", "writing the codebook", "committing")
ORDER = ("starting", *MOMENTS, "ended")
LONGEST_WAIT = {"selecting": 0.2, "writing the codebook": 0.05, "committing": 0.0}
"""Seconds from the beginning of a moment to the fault are drawn below this; below 1 while shards are probed."""
TRIES = 3


class Planned(NamedTuple):
    """A trial: its number, the fault and the moment it shall strike at."""

    number: int
    fault: str
    moment: str


def plan(seed: int, count: int) -> list[Planned]:
    """The trials of a seed: every fault in turn, in an order and at moments drawn at random. More begin with the same ones.

    Workers exist while shards are probed, and only then does a node that joins matter.
    """
    rng, found = np.random.default_rng(seed), list[Planned]()
    while len(found) < count:
        for fault in rng.permutation(FAULTS).tolist():
            moment = str(rng.choice(PROBING if fault in ("worker", "late node") else MOMENTS))
            found.append(Planned(len(found), fault, moment))
    return found[:count]


def possible(fault: str) -> bool:
    """Whether this user can bring it about: the full disk is a small tmpfs, which only root can mount."""
    return fault != "disk full" or os.geteuid() == 0


@dataclass(frozen=True)
class Whole:
    """The uninterrupted build: its digest, its rows, and its files without what is random in their names."""

    digest: str
    rows: int
    files: Counter[str]


@dataclass(frozen=True)
class Struck:
    """A build and the fault in it: where it was, whether the fault was brought about in time, how the build ended."""

    moment: str
    in_time: bool
    code: int
    out: str

    @property
    def well(self) -> bool:
        """Whether the build has ended with a codebook; a stopped job's command ends with 0, too."""
        return self.code == 0 and '"digest"' in self.out


class Trial:
    """One build in a folder of its own, the faults in it, and the checks afterwards."""

    def __init__(self, cluster: Cluster, folder: Path, shards: Path, rng: np.random.Generator, **changes: Any) -> None:
        self.cluster, self.folder, self.shards, self.rng = cluster, folder, shards, rng
        folder.mkdir()
        self.run = folder / "book.run"
        self.config = write_config(folder, shards, **changes)

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

    def moment(self) -> str:
        """Where the build is, by its files."""
        if (self.folder / "book" / MANIFEST).exists():
            return "ended"
        if staged := list(self.folder.glob(".book.*.tmp")):
            return "committing" if any((folder / CARD).exists() for folder in staged) else "writing the codebook"
        done = len(list(self.run.glob("parts/_done/*.json")))
        if done == SHARDS:
            return "selecting"
        if done or any(self.run.glob("parts/part-*")):
            return PROBING[1 + done]
        return "calibrating" if any(self.run.glob("calibration/part-*")) else "starting"

    def is_at(self, moment: str) -> bool:
        """Whether the build has come so far."""
        return ORDER.index(self.moment()) >= ORDER.index(moment)

    def strike(self, fault: str, moment: str) -> Struck:
        """Start a build, bring the fault about at that moment or soon after, and wait for the build to end."""
        job, before = fault == "job stop", set(self.cluster.workers())
        process = self.start(job)
        until(lambda: set(self.cluster.workers()) - before, process, 0.2)  # the files of a build that goes on are there at once
        until(partial(self.is_at, PROBING[0]), process)
        late = moment not in PROBING
        drivers = self.cluster.drivers(self.config) if job else [process.pid]
        until(partial(self.is_at, moment), process, 0.001 if late else 0.02)
        time.sleep(float(self.rng.random()) * LONGEST_WAIT.get(moment, 1.0))
        with stopped(drivers if late else []):
            found = self.moment()
            in_time = self.bring_about(fault, process, drivers) and found != "ended"
        out, _ = process.communicate(timeout=SECONDS)
        return Struck(found, in_time, process.returncode, out)

    def bring_about(self, fault: str, process: subprocess.Popen[Any], drivers: Sequence[int]) -> bool:
        """Do it; False if there was nothing to do it to."""
        if fault == "worker":
            until(self.cluster.workers, process)
            for pid in self.cluster.workers()[:1] if self.rng.random() < 0.5 else self.cluster.workers()[-1:]:
                with suppress(ProcessLookupError):  # ended by itself meanwhile
                    os.kill(pid, signal.SIGKILL)
                    return True
            return False
        ended = process.poll() is not None
        if fault == "job stop":
            self.cluster.stop_job(self.folder.name)
            until(lambda: all(is_told(pid, signal.SIGTERM) for pid in drivers), process)
        else:
            actions: dict[str, Callable[[], Any]] = {
                "driver": process.kill, "interrupt": partial(process.send_signal, signal.SIGINT),
                "node": self.cluster.kill_node, "late node": self.cluster.add_node, "disk full": partial(fill, self.folder),
            }  # fmt: skip
            actions[fault]()
        return not ended

    def once(self, fault: str, moment: str, whole: Whole) -> dict[str, Any]:
        """A build with one fault; every field but those about the fault must be what a sound build has."""
        with self.surroundings(fault):
            struck = self.strike(fault, moment)
            if fault == "disk full":
                resize(self.folder, "64m")
            codes, checked = self.finish(struck, whole)
        ended = struck.in_time and (fault in SURVIVED or not struck.well)
        return {"fault": fault, "drawn": moment, "moment": struck.moment, "struck": ended, "exit codes": codes, **checked}

    @contextmanager
    def surroundings(self, fault: str) -> Iterator[None]:
        """What a fault needs: a disk of its own, or a node that is not there yet. Afterwards both nodes are there again."""
        if fault == "late node":
            self.cluster.kill_node()
        if fault == "disk full":
            config = self.config.read_text()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "t", self.folder], check=True)
            self.config.write_text(config)
        try:
            yield
        finally:
            if fault == "disk full":
                subprocess.run(["umount", self.folder], check=True)
            self.cluster.add_node()

    def finish(self, struck: Struck, whole: Whole) -> tuple[list[int], dict[str, Any]]:
        """Run the same command again until it ends well; (exit codes of all runs, what is wrong then)."""
        codes, out, well = [struck.code], struck.out, struck.well
        while not well and len(codes) <= TRIES:
            process = self.start()
            out, _ = process.communicate(timeout=SECONDS)
            codes.append(process.returncode)
            well = process.returncode == 0
        return codes, self.check(whole, out) if well else {"problem": f"the build never ended well: {out[-300:]}"}

    def check(self, whole: Whole, out: str) -> dict[str, Any]:
        """What is wrong after the build has ended well."""
        said = json.loads([line for line in out.splitlines() if line.startswith("{")][-1])
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
        files = names_of(self.folder)
        strays, missing = sorted((files - whole.files).elements()), sorted((whole.files - files).elements())
        wrong = {
            "digest": said["digest"] != whole.digest,
            "rows lost or twice": not whole.rows == found.num_rows == distinct,
            f"stray files {strays}": bool(strays),
            f"missing files {missing}": bool(missing),
        }
        return {"rows": found.num_rows, "problem": ", ".join(name for name, is_so in wrong.items() if is_so)}


def resize(folder: Path, size: str) -> None:
    """Give the tmpfs mounted there another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True, capture_output=True)


def fill(folder: Path) -> None:
    """Leave no room on the tmpfs mounted there: as small as what is on it, which may be growing."""
    for _ in range(100):
        disk = os.statvfs(folder)
        with suppress(subprocess.CalledProcessError):
            return resize(folder, str((disk.f_blocks - disk.f_bfree) * disk.f_frsize))
    raise TimeoutError


def names_of(folder: Path) -> Counter[str]:
    """The files below a folder, counted by their names without attempt and random part."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    return Counter(re.sub(r"-\d+-[0-9a-f]{32}\.parquet$", ".parquet", name) for name in names)


def write_config(folder: Path, shards: Path, **changes: Any) -> Path:
    """A small build of all shards with two workers; `changes` replace sections."""
    data = {
        "model": str(CHECKPOINT), "shards": [f"{shards}/s-{{0..{SHARDS - 1}}}.tar"], "output": str(folder / "book"),
        "probe": {"tokens_per_image": 6},
        "thresholds": {"calibration_images": 3, "top1_prob": {"quantile": 0.9}, "influence": {"quantile": 0.9}},
        "selection": {"min_images": 0, "inter_clusters": 2, "intra_clusters": 2},
        "cluster": {"workers": 2, "cpus_per_worker": 1, "attempts": 3},
    }  # fmt: skip
    (folder / "c.json").write_text(json.dumps(data | changes))
    return folder / "c.json"


def uninterrupted(folder: Path, **changes: Any) -> tuple[Path, Whole]:
    """Write shards below `folder`, and build from them without Ray: (the shards' folder, the build)."""
    shards = folder / "shards"
    shards.mkdir()
    for s in range(SHARDS):
        scenes = ((f"{s}-{i}", {"png": render(make_scene("codebook", IMAGES * s + i), canvas=True)}) for i in range(IMAGES))
        write_shard(shards / f"s-{s}.tar", scenes)
    (folder / "whole").mkdir()
    config = write_config(folder / "whole", shards, **changes)
    command = [sys.executable, "-m", "codebook_builder.cli", "run", str(config), "--local", "--json"]
    said = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    return shards, Whole(said["digest"], said["counts"]["tokens"], names_of(folder / "whole"))


def trials(planned: Sequence[Planned], seed: int) -> Iterator[dict[str, Any]]:
    """Run some trials on one cluster; yields what each did. One whose moment had passed when the fault came is tried again."""
    with tempfile.TemporaryDirectory(prefix="f", ignore_cleanup_errors=True) as name:
        shards, whole = uninterrupted(Path(name))
        cluster = Cluster(Path(name))
        try:
            for number, fault, moment in planned:
                for attempt in range(TRIES):
                    began = time.monotonic()
                    folder = Path(name) / f"trial-{seed}-{number}-{attempt}"
                    row = Trial(cluster, folder, shards, np.random.default_rng([seed, number, attempt])).once(
                        fault, moment, whole
                    )
                    shutil.rmtree(folder, ignore_errors=True)
                    if row["struck"] or row["problem"]:
                        break
                yield {"trial": number, **row, "seconds": round(time.monotonic() - began)}
        finally:
            cluster.close()
