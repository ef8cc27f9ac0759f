"""The distributed loop on Ray Core: actors, one shard a call, a driver that owns retries.

The work is idempotent (see commit.py), so a lost answer only costs time. Ray restarts and retries nothing by itself: the driver
hands a shard to a ready actor, at most `in_flight` at once, replaces actors that die and requeues what they held.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import codebook_builder
import codebook_prune
import codebook_schemas
from codebook_builder.tasks import Failure, Outcome, ShardResult, ShardTask
from codebook_builder.worker import process_shard
from codebook_schemas import ClusterConfig, UserError

PACKAGES = (codebook_builder, codebook_prune, codebook_schemas)
SECONDS_BETWEEN_LOOKS = 0.2
FREE_DEATHS = 20
"""How often a shard may be lost to a machine that went away before that counts as its own failure."""


def package_folders() -> list[str]:
    """Folders of our packages, as they are shipped to a cluster's workers."""
    return [str(Path(str(package.__file__)).parent) for package in PACKAGES]


def code_hash() -> str:
    """Hash of the source of our packages: driver and workers must agree on it."""
    digest = hashlib.sha256()
    for folder in package_folders():
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def die_above(bytes_resident: float) -> None:
    """Watch this process from a thread, and kill it when it holds more memory than that (for workers, whose driver retries)."""
    page = os.sysconf("SC_PAGE_SIZE")

    def watch() -> None:
        while True:
            if int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * page > bytes_resident:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    Thread(target=watch, name="memory limit", daemon=True).start()


class ShardActor:
    """One worker process; `process_shard` keeps the model in it between calls."""

    def __init__(self, memory_gb: float = 0.0) -> None:
        if memory_gb:
            die_above(memory_gb * 2**30)

    def ready(self) -> tuple[str, str]:
        """(node id, hash of the code this worker runs)."""
        import ray

        return ray.get_runtime_context().get_node_id(), code_hash()

    def process(self, task: ShardTask) -> ShardResult:
        """See `process_shard`."""
        return process_shard(task)


@dataclass
class _Worker:
    """An actor, its node once it is ready, and what it holds, oldest first (it works in that order).

    `since` is when it began with the oldest (`time.monotonic`); `late`: it was killed for taking too long.
    """

    actor: Any
    starting: Any
    node: str | None = None
    held: dict[Any, ShardTask] = field(default_factory=dict)
    since: float = 0.0
    late: bool = False


class Dispatch:
    """One pass over some tasks, on the Ray that this process is connected to."""

    def __init__(self, config: ClusterConfig, tasks: Sequence[ShardTask]) -> None:
        import ray

        self.config = config
        self.queue = deque(tasks)
        self.deaths: dict[str, int] = {}
        self.suspects: set[str] = set()
        self.failed_starts = 0
        self.code = code_hash()
        self.remote = ray.remote(ShardActor).options(
            num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker, max_restarts=0, max_task_retries=0
        )
        self.workers = [self._start() for _ in range(min(config.workers, len(tasks)))]

    def _start(self) -> _Worker:
        actor = self.remote.remote(self.config.worker_memory_gb)
        return _Worker(actor, actor.ready.remote())

    def outcomes(self) -> Iterator[Outcome]:
        """Every task's result or failure, in the order they finish."""
        import ray

        try:
            while self.queue or any(worker.held for worker in self.workers):
                self._hand_out()
                waiting = [ref for w in self.workers for ref in (w.held if w.node else [w.starting])]
                ready, _ = ray.wait(waiting, num_returns=1, timeout=self._patience())
                if not ready:
                    self._kill_late()
                    continue
                worker = next(w for w in self.workers if ready[0] == w.starting or ready[0] in w.held)
                if worker.node is None:
                    self._greet(worker)
                else:
                    yield from self._collect(worker, ready[0])
        finally:
            for worker in self.workers:
                ray.kill(worker.actor)

    def _hand_out(self) -> None:
        """Fill ready actors evenly: the first free place of every actor before the second of any. A suspect runs alone."""
        for places in range(1, self.config.in_flight + 1):
            for worker in self.workers:
                if not (self.queue and worker.node and len(worker.held) < places):
                    continue
                if worker.held and any(t.shard.name in self.suspects for t in (self.queue[0], *worker.held.values())):
                    continue
                task = self.queue.popleft()
                if not worker.held:
                    worker.since = time.monotonic()
                worker.held[worker.actor.process.remote(task)] = task

    def _patience(self) -> float | None:
        """Seconds until the next shard is over its time; None: none can be."""
        running = [worker.since for worker in self.workers if worker.held and not worker.late]
        if not self.config.shard_seconds or not running:
            return None
        return max(0.0, min(running) + self.config.shard_seconds - time.monotonic())

    def _kill_late(self) -> None:
        """Kill actors whose oldest shard is over its time; `_collect` then finds them dead."""
        import ray

        limit = time.monotonic() - self.config.shard_seconds
        for worker in self.workers:
            if worker.held and not worker.late and worker.since <= limit:
                worker.late = True
                ray.kill(worker.actor)

    def _greet(self, worker: _Worker) -> None:
        import ray

        try:
            worker.node, code = ray.get(worker.starting)
        except ray.exceptions.RayError as error:
            self.failed_starts += 1
            if self.failed_starts >= self.config.attempts * self.config.workers:
                raise UserError(f"workers die while they start: {str(error).strip().splitlines()[-1]}") from None
            self._replace(worker)
            return
        self.failed_starts = 0  # nodes come and go: only failures in a row say that none can start
        if code != self.code:
            raise UserError(f"workers run other code ({code}) than the driver ({self.code}): submit jobs/build_codebook.py")

    def _collect(self, worker: _Worker, ref: Any) -> Iterator[Outcome]:
        import ray

        try:
            result: ShardResult = ray.get(ref)
        except UserError as error:  # as raised in the worker, without Ray's traceback
            raise UserError(str(getattr(error, "cause", error))) from None
        except ray.exceptions.RayTaskError:
            task, trace = worker.held.pop(ref), traceback.format_exc()
            self._go_on(worker)
            yield from self._again(task, trace)
        except ray.exceptions.RayError:
            yield from self._bury(worker, traceback.format_exc())
        else:
            del worker.held[ref]
            self._go_on(worker)
            yield result

    def _go_on(self, worker: _Worker) -> None:
        """An actor begins with its next shard, unless it was killed for one that ended just then: others get what it holds."""
        worker.since = time.monotonic()
        if worker.late:
            self.queue.extendleft(reversed(worker.held.values()))
            self._replace(worker)

    def _bury(self, worker: _Worker, error: str) -> Iterator[Outcome]:
        """An actor died: the shard it ran is blamed, unless the machine went away.

        A result may be lost with its actor, so of several shards held any may have been the one: they wait again as
        suspects, to run alone, and none is blamed. Only an actor killed for being late is known to have run its oldest.
        """
        import ray

        held = list(worker.held.values())
        self._replace(worker)
        if len(held) > 1 and not worker.late:
            self.suspects.update(task.shard.name for task in held)
            self.queue.extendleft(reversed(held))
            return
        if worker.late:
            error = f"the shard took more than {self.config.shard_seconds:g} seconds (cluster.shard_seconds)"
        elif self.config.worker_memory_gb:
            limit = f"held more than {self.config.worker_memory_gb:g} GiB (cluster.worker_memory_gb)"
            error += f"\nthe worker died: it crashed, was killed, or {limit}; which of these is not known\n"
        lost, *rest = held
        self.queue.extendleft(reversed(rest))
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self.deaths[lost.shard.name] = self.deaths.get(lost.shard.name, 0) + 1
        if worker.node not in alive and self.deaths[lost.shard.name] <= FREE_DEATHS:
            self.queue.append(lost)
        else:
            yield from self._again(lost, error)

    def _again(self, task: ShardTask, error: str) -> Iterator[Outcome]:
        """Requeue a shard at the end, or give it up after `attempts`."""
        if task.attempt + 1 < self.config.attempts:
            self.queue.append(replace(task, attempt=task.attempt + 1))
        else:
            yield Failure(task, error)

    def _replace(self, worker: _Worker) -> None:
        import ray

        ray.kill(worker.actor)
        time.sleep(0.1)
        self.workers[self.workers.index(worker)] = self._start()
