"""A worker whose samples bite: shards named after what they do to it. Imported by Ray's workers, so it stands alone."""

from __future__ import annotations

import ctypes
import time

from codebook_builder.dispatch import ShardActor
from codebook_builder.tasks import ShardResult, ShardTask


class BitingActor(ShardActor):
    """Segfaults, hangs or eats memory where the real one would probe."""

    def process(self, task: ShardTask) -> ShardResult:
        if "segfault" in task.shard.name:
            ctypes.string_at(0)
        if "hang" in task.shard.name:
            time.sleep(600)
        if "memory" in task.shard.name:
            hoard = [bytes([i]) * (16 << 20) for i in range(200)]
            time.sleep(len(hoard))
        return ShardResult(task.shard.name, rows=1, images=1, skipped=())
