"""A worker whose samples bite: shards named after what they do to it. Imported by Ray's workers, so it stands alone."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

from codebook_builder import worker
from codebook_builder.commit import Skipped
from codebook_builder.dispatch import ShardActor
from codebook_builder.scores import to_table
from codebook_builder.tasks import ShardResult, ShardTask


def bite(name: str) -> None:
    """Segfault, hang or eat memory, if the name says so."""
    if "segfault" in name:
        ctypes.string_at(0)
    if "hang" in name:
        time.sleep(600)
    if "memory" in name:
        hoard = [bytes([i]) * (16 << 20) for i in range(200)]
        time.sleep(len(hoard))


class BitingActor(ShardActor):
    """Bites where the real one would probe; without a model its other shards are done at once."""

    def process(self, task: ShardTask) -> ShardResult:
        if task.spec is None:
            bite(task.shard.name)
            return ShardResult(task.shard.name, rows=1, images=1, skipped=())

        def table(scores: Any, shard: str, dimension: int) -> Any:
            bite(shard)
            return to_table(scores, shard, dimension)

        worker.to_table = table  # when the part is open, and empty
        return super().process(task)


class RaisingActor(ShardActor):
    """Raises on every attempt before the one that the shard's name ends in."""

    def process(self, task: ShardTask) -> ShardResult:
        if task.attempt < int(task.shard.name[-1]):
            raise RuntimeError(f"attempt {task.attempt} of {task.shard.name}")
        return ShardResult(task.shard.name, 1, 1, ())


class MeetingActor(ShardActor):
    """Waits in the task's folder until workers on two GPUs are there, however long one takes to start; says on which it ran."""

    def process(self, task: ShardTask) -> ShardResult:
        import ray

        gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        for gpu in gpus:
            (Path(task.folder) / gpu).touch()
        deadline = time.monotonic() + 90
        while len(list(Path(task.folder).iterdir())) < 2:
            if time.monotonic() > deadline:
                raise RuntimeError("no second worker came")
            time.sleep(0.05)
        return ShardResult(task.shard.name, 1, 1, tuple(Skipped(key=gpu, reason="is the GPU it ran on") for gpu in gpus))
